import torch

from adavipro_fast.artifact.answers import described

MASK = torch.zeros(7, 7)


def test_a_class_called_unknown_is_told_from_a_rejection():
    probabilities = torch.tensor([0.9, 0.1])
    sure = described(probabilities, MASK, ("unknown", "cat"), 0.5, 2)
    assert (sure["answer"], sure["rejected"]) == ("unknown", False)
    unsure = described(probabilities, MASK, ("dog", "cat"), 0.95, 2)
    assert (unsure["answer"], unsure["rejected"]) == ("unknown", True)
