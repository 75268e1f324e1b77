"""dynarep: do two papers on model-generated data in reinforcement learning hold up?"""

__version__ = "0.1.0"
