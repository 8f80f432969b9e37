"""Models: GPT-2, Llama and pretrained ones, with attention, document masks and sampling."""
