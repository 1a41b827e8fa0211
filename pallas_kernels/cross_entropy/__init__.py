"""Cross-entropy of a linear head, without ever holding all the logits.

"tpu" and "hopper" are kernels that hold no logits; "chunked" is XLA's and serves every device.

Milliseconds of forward and backward together by the compiled schedule, without waits for HBM, and
the share of the chip's peak that the four necessary products have (8,192 tokens, 2,048 wide, 32,000
words, bfloat16, jax 0.10.2):

| chip | least | tpu | chunked |
|---|---|---|---|
| TPU v5e | 21.8 | 22.4 (97%) | 23.5 (93%) |
| TPU v5p | 9.4 | 9.7 (97%) | 10.3 (91%) |
| TPU v6e | 4.7 | 5.2 (90%) | 6.7 (70%) |
| TPU v4 | 15.6 | 21.7 (72%) | 20.4 (76%) |

Chunk by chunk "chunked" also moves its float32 gradient of the head to HBM and back, which takes
longer than the product that it is added to: 10 ms in all on a v5e, 5 on a v6e, 7 on a v4. On a v4,
whose vector memory is small, the kernels make the logits once more than elsewhere.
"""

from pallas_kernels.cross_entropy.api import cross_entropy, implementations

__all__ = ["cross_entropy", "implementations"]
