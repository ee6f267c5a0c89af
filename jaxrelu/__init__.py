"""The rectifiers in JAX, with a stated derivative at every kink."""

from jaxrelu.functions import elu as elu
from jaxrelu.functions import leaky_relu as leaky_relu
from jaxrelu.functions import prelu as prelu
from jaxrelu.functions import relu as relu
from jaxrelu.functions import relu6 as relu6

__version__ = "0.1.0"
