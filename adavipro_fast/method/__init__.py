"""What is computed: the prompt, the mask generator, and the frozen encoder behind them."""
