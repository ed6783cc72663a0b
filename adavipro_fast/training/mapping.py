"""Mapped heads: each class in the place of one class of the encoder's own classifier.

Frequency mapping takes the class that a class's training images are most often predicted as; the
iterative one takes it anew at every epoch, for the prompt of then (Chen et al., "Understanding and
Improving Visual Prompting: A Label-Mapping Perspective", CVPR 2023). Both are one to one there, as
in AutoVP with one source class each (Tsao et al., ICLR 2024), and so they are here.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from adavipro_fast.data.split import Split
from adavipro_fast.device import full_fp32
from adavipro_fast.method.config import DTYPES, PromptConfig
from adavipro_fast.method.encoder import Classifier, FrozenEncoder
from adavipro_fast.method.model import AdaViPro
from adavipro_fast.training.group import Group

BATCH = 64


def classifier_of(encoder: FrozenEncoder) -> Classifier:
    """Return an encoder's own classifier.

    Raises:
        ValueError: it has none.
    """
    own = encoder.classifier
    if not isinstance(own, Classifier):
        raise ValueError(
            f"encoder {encoder.name!r} has no classifier to map classes from: {own.reason}; use "
            "--head text or --head linear"
        )
    return own


def unmapped_rows(encoder: FrozenEncoder, count: int) -> tuple[Tensor, Tensor]:
    """Return rows (K, F) and bias (K,) of a mapped head's size, to be mapped.

    Raises:
        ValueError: the encoder has no classifier, or one of fewer than `count` classes.
    """
    weight = classifier_of(encoder).weight
    if count > len(weight):
        raise ValueError(
            f"{count} classes cannot be mapped one to one: the classifier of {encoder.name!r} has "
            f"{len(weight)}; use --head linear"
        )
    return weight.new_zeros(count, weight.shape[1]), weight.new_zeros(count)


def unprompted(encoder: FrozenEncoder, count: int, region_size: int) -> AdaViPro:
    """Build the model whose mapping is zero-shot: the encoder alone, its head to be mapped."""
    settings = PromptConfig(
        "zero_shot", head="mapped", head_input="features", region_size=region_size
    )
    rows, bias = unmapped_rows(encoder, count)
    return AdaViPro(encoder, rows, settings, class_bias=bias)


def assigned(counts: Tensor) -> Tensor:
    """Give each class a source class of its own, the largest counts first.

    Among equals the first source class is taken, then the first class; so a class that nothing was
    predicted for takes what is left.

    Args:
        counts: (C, K), how often images of class k were predicted as source class c; K up to C.

    Returns:
        (K,) source classes, all different.
    """
    left, classes = counts.clone(), counts.shape[1]
    mapping = torch.zeros(classes, dtype=torch.long)
    for _ in range(classes):
        source, target = divmod(int(left.argmax()), classes)
        mapping[target] = source
        left[source], left[:, target] = -1, -1
    return mapping


@torch.no_grad()
def counted(model: AdaViPro, split: Split, group: Group) -> Tensor:
    """Count what a model's encoder predicts of prompted images, with argmax masks.

    Each process takes its share of the batches of a single process.

    Returns:
        (C, K), on the CPU, the same in every process.
    """
    classifier, prompt = classifier_of(model.encoder), model.prompt
    device, classes = prompt.mean.device, len(model.class_embeddings)
    dtype = DTYPES[model.encoder.precision]
    counts = torch.zeros(len(classifier.bias) * classes, device=device)
    batches = split.batches(BATCH, device, part=group.rank, of=group.size)
    total, quiet = -(-len(split) // BATCH // group.size), None if group.leads else True
    training = prompt.training
    prompt.eval()
    try:
        for images, labels in tqdm(batches, "mapping", total, leave=False, disable=quiet):
            features = model.encoder.embed(prompt(images, dtype=dtype).images)[1]
            with full_fp32():
                predicted = classifier(features).argmax(1)
            counts += torch.bincount(predicted * classes + labels, minlength=len(counts))
    finally:
        prompt.train(training)
    return group.sum(counts).cpu().view(-1, classes)


def map_classes(model: AdaViPro, split: Split, group: Group) -> int:
    """Put the rows of the classes' source classes in a mapped head; return how many changed.

    Args:
        model: changed in place.
        split: training images.
        group: the processes that train together.
    """
    classifier = classifier_of(model.encoder)
    mapping = assigned(counted(model, split, group)).to(classifier.weight.device)
    rows, bias = classifier.weight[mapping], classifier.bias[mapping]
    assert model.class_bias is not None
    changed = (rows != model.class_embeddings).any(1) | (bias != model.class_bias)
    model.class_embeddings.copy_(rows)
    model.class_bias.copy_(bias)
    return int(changed.sum())
