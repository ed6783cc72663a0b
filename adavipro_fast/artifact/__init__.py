"""One runner for every file that can classify images.

artifact = open_artifact("runs/demo-adavipro-1/checkpoint.safetensors")
logits, mask, embedding = artifact(pixels)            # (B, 3, S, S) uint8 RGB
print(artifact.about.class_names[logits[0].argmax()])
"""

from adavipro_fast.artifact.open import open_artifact

__all__ = ["open_artifact"]
