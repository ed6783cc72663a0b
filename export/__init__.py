"""Export checkpoints to deployable files: ONNX, TensorRT engines, task files, Triton models."""
