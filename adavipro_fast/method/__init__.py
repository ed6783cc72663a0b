"""The model: the prompt, the mask generator, the frozen encoder and the head."""
