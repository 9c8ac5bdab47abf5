"""`python -m remask`: what launchers such as torchrun and accelerate start."""

from .cli import main

main()
