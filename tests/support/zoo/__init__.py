"""Losses of one example, by topic: what `per_example_grad` has to get right, and where it has to keep factors."""

from support.zoo import (
    attention,
    control,
    convolution,
    dense,
    embedding,
    functions,
    literals,
    maps,
    parts,
    recurrent,
    sharing,
    structure,
)
from support.zoo.base import Loss

TOPICS = (
    dense,
    attention,
    embedding,
    sharing,
    parts,
    functions,
    control,
    recurrent,
    convolution,
    structure,
    literals,
    maps,
)
ENTRIES: list[Loss] = [entry for topic in TOPICS for entry in topic.ENTRIES]
