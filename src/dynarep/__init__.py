"""dynarep: do two papers on model-generated data in reinforcement learning hold up?"""

from dynarep import mkl

__version__ = "0.1.0"

mkl.prefer()  # before anything imports PyTorch
