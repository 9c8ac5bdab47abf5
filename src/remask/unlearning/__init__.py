"""Unlearning by training: the masked-diffusion trainer."""
