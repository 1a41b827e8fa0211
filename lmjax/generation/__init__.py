"""Text from a trained model: decoding with a key-value cache, sampling, streaming."""

from lmjax.generation.beams import BeamSearch as BeamSearch
from lmjax.generation.beams import Hypothesis as Hypothesis
from lmjax.generation.generator import Continuation as Continuation
from lmjax.generation.generator import Generator as Generator
from lmjax.generation.messages import Message as Message
from lmjax.generation.messages import ToolCall as ToolCall
from lmjax.generation.run import chat_format as chat_format
from lmjax.generation.run import load as load
from lmjax.generation.run import load_model as load_model
from lmjax.generation.run import load_run as load_run
from lmjax.generation.sampling import Sampling as Sampling
from lmjax.generation.text import TextGenerator as TextGenerator
from lmjax.generation.text import TextStream as TextStream
from lmjax.generation.text import prompt_tokens as prompt_tokens
