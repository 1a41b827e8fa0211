"""Products of rows with the matrix of their group, for mixtures of experts.

The time of each implementation as a multiple of one dense product of all rows; in bold what None
takes. CPU: `python -m benchmarks.grouped_product`, one run on 2 cores that others used as well,
4,096 rows, 512 x 1,024, float32 (benchmarks/results/grouped_product_cpu.json). TPU: static cycles
of the compiled kernels in jax 0.10.2, 8,192 rows, 2,048 x 2,048, bfloat16, 8 uneven groups, without
waits for HBM.

| device | implementation | forward | gradient of rows | of matrices |
|---|---|---|---|---|
| CPU, 8 groups | **blocks** | 2.5 | with all gradients 1.6 | |
| CPU, 8 groups | ragged | 8.1 | with all gradients 9.9 | |
| CPU, 32 groups | **blocks** | 2.4 | with all gradients 1.4 | |
| CPU, 32 groups | ragged | 33 | with all gradients 33 | |
| TPU v5e | **tpu** | 1.17 | 1.17 | 1.42 |
| TPU v5e | ragged | about 1.6 | not counted | 8.2 (1 in jax 0.12) |
| TPU v6e | **tpu** | 1.45 | 1.41 | 2.0 |

GPUs take "blocks", since `ragged_dot` there is as many dense products as there are groups; it was
compiled for an H100 and not timed.
"""

from pallas_kernels.grouped_product.api import grouped_product, implementations

__all__ = ["grouped_product", "implementations"]
