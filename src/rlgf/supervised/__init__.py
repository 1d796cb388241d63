"""Supervised training: language modeling, SFT, distillation and reward modeling."""
