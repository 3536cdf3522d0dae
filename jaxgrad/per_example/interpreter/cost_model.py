"""Whether a product is kept factored or materialized."""


def worth_holding(held: int, size: int) -> bool:
    """The one decision, from shapes alone: a product is held if its sides hold fewer numbers than its array has.

    Args:
        held: the number of entries of the sides, or of all that would be held in place of the array.
        size: the number of entries of the array.
    """
    return held < size
