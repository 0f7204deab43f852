"""raybd: can a backdoored CLIP model be cleaned, and at what cost in accuracy?"""

__version__ = "0.1.0"
