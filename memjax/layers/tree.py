"""Nested dictionaries as flat ones: the path of a leaf, its names joined by '/', is its name."""
import math
from typing import Any

import jax


def named(tree: Any, is_leaf=None) -> dict[str, Any]:
  """{'layers/attention/query': leaf, ...} in tree order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def unnamed(flat: dict[str, Any], like: Any) -> Any:
  """The tree of the structure of `like` whose leaves are looked up by name in `flat`.

  A leaf of size zero that `flat` lacks comes from `like`. Raises KeyError for any other missing name.
  """
  def look_up(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return leaf if name not in flat and is_empty(leaf) else flat[name]
  return jax.tree_util.tree_map_with_path(look_up, like)


def is_empty(leaf: Any) -> bool:
  """Whether an array (or its shape) holds no element."""
  return math.prod(leaf.shape) == 0


def nbytes(tree: Any) -> int:
  """Bytes of all arrays (or shapes) of a tree."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
