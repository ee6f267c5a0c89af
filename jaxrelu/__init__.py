"""The rectifiers in JAX, with a stated derivative at every kink."""

from jaxrelu import inplace
from jaxrelu._lowering import portable
from jaxrelu.functions import elu, leaky_relu, prelu, relu, relu6

__all__ = ["elu", "inplace", "leaky_relu", "portable", "prelu", "relu", "relu6"]

__version__ = "0.1.0"
