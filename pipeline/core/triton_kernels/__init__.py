"""The operations of the sparse step as Triton kernels, for CUDA. Importing this package imports triton.

    bag, row_products, bag_of_tokens, topk, largest      as in `core/products.py`, which chooses them
    bag_gradients      weight gradient and value gradient of a bag in one pass over the table
    adam               weight gradient and Adam in one pass over weights and moments

Every result is the same bits each time: nothing is added by atomics but whole numbers. Without a GPU the kernels run
under Triton's interpreter, on CPU tensors, where TRITON_INTERPRET=1 was set before triton was first imported. Sizes of
blocks and numbers of warps are reckoned, not tuned: the kernels have not been timed.
"""

from pipeline.core.triton_kernels.adam import adam
from pipeline.core.triton_kernels.by_feature import bag_gradients, bag_of_tokens, row_products
from pipeline.core.triton_kernels.by_token import bag
from pipeline.core.triton_kernels.selection import largest, topk
from pipeline.core.triton_kernels.shapes import handles

__all__ = ["adam", "bag", "bag_gradients", "bag_of_tokens", "handles", "largest", "row_products", "topk"]
