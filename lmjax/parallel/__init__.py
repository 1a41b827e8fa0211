"""Sharding: the device mesh, and the layout that maps a model's axes onto it."""

from lmjax.parallel.layout import Context as Context
from lmjax.parallel.layout import Layout as Layout
from lmjax.parallel.layout import generation_layout as generation_layout
from lmjax.parallel.layout import serving_layout as serving_layout
from lmjax.parallel.layout import training_layout as training_layout
from lmjax.parallel.mesh import AXES as AXES
from lmjax.parallel.mesh import DATA as DATA
from lmjax.parallel.mesh import STAGE as STAGE
from lmjax.parallel.mesh import Mesh as Mesh
from lmjax.parallel.mesh import axis_size as axis_size
