"""Tensors in, tensors out: the stable public face of the generator and the inversion methods.

from models import load_generator, load_method

generator = load_generator("faces64")
inversion = load_method("e4e", generator).invert(images, None, SampleRng([0]))
picture = inversion.render(generator)
"""

from models.checkpoints.load import load_generator as load_generator
from models.inversion.base import Inversion as Inversion
from models.inversion.base import Method as Method
from models.inversion.base import SampleRng as SampleRng
from models.inversion.base import sample_seed as sample_seed
from models.inversion.registry import load_method as load_method
from models.stylegan2.generator import Generator as Generator
from models.stylegan2.residual import LowRank as LowRank
