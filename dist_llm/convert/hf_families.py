"""All families of Hugging Face decoders, in the order in which an export tries them."""

from dist_llm.convert.hf_decoder_families import DENSE_FAMILIES
from dist_llm.convert.hf_family import Family
from dist_llm.convert.hf_moe_families import MOE_FAMILIES

DECODER_FAMILIES: dict[str, Family] = {**DENSE_FAMILIES, **MOE_FAMILIES}
