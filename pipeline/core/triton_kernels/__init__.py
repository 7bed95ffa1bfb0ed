"""The operations of the sparse step as Triton kernels, for CUDA. Importing this package imports triton.

    bag, row_products, bag_of_tokens, topk     as in `core/products.py`, which chooses them
    largest                                    BatchTopK's choice, as in `core/topk.py`
    bag_gradients                              weight gradient and value gradient of a bag in one pass over the table
    adam_                                      weight gradient and Adam in one pass over weights and moments

Every result is the same bits each time: nothing is added by atomics but whole numbers. Without a GPU the kernels run
under Triton's interpreter, on CPU tensors, where TRITON_INTERPRET=1 was set before triton was first imported.
"""

from pipeline.core.triton_kernels.by_feature import Moments, adam_, bag_gradients, bag_of_tokens, joined
from pipeline.core.triton_kernels.by_token import bag, row_products
from pipeline.core.triton_kernels.selection import largest, topk

__all__ = ["Moments", "adam_", "bag", "bag_gradients", "bag_of_tokens", "joined", "largest", "row_products", "topk"]
