"""The dynamic context bank: past text compressed into a fixed number of slots."""
from memjax.config.errors import refuse
from memjax.config.mixers import mixer
from memjax.config.options import option


@mixer('context')
class ContextConfig:
  """Context bank: every `ratio` tokens are pooled into one slot; slots merge, age and are read by attention."""
  heads: int = option(8, 'query heads', low=1)
  kv_heads: int = option(0, 'key and value heads; 0 = heads', low=0)
  slots: int = option(256, 'S, slots of the bank; one alone would leave nothing to choose', low=2)
  ratio: int = option(100, 'tokens pooled into one slot', low=1)
  clusters: int = option(0, 'clusters of slots of which a token reads a few; 0 = every token reads all slots', low=0)
  top_k: int = option(4, 'clusters a token reads', low=1)
  iterations: int = option(0, 'Lloyd steps from a farthest-point start at each new slot; 0 = the new slot joins the nearest cluster', low=0)
  merge: str = option('weighted', 'a full bank makes room: weighted mean or plain sum of the cheapest pair, or the weakest slot goes',
                      choices=('weighted', 'sum', 'evict'))
  decay: float = option(0.99, 'importance kept for each slot made since', low=0.0, high=1.0)
  new_importance: float = option(1.0, 'importance of a new slot, in tokens that read it', low=1e-6)
  threshold: float = option(0.01, 'attention above which a token refers to a slot', low=0.0, high=1.0)
  out_gate: str = option('', "'silu' multiplies the read by silu(W x), so that a token can leave the bank unread", choices=('', 'silu'))

  def __post_init__(self):
    refuse(bool(self.kv_heads) and self.heads % self.kv_heads != 0,
           f'kv_heads={self.kv_heads} does not divide heads={self.heads}')
    refuse(self.clusters >= self.slots, f'clusters={self.clusters} must be below slots={self.slots}: a cluster is for several slots')
    refuse(0 < self.clusters < self.top_k, f'top_k={self.top_k} exceeds clusters={self.clusters}')
    refuse(not self.clusters and self.top_k != 4, f'top_k={self.top_k} applies to clusters; clusters is 0')
    refuse(not self.clusters and self.iterations > 0, f'iterations={self.iterations} applies to clusters; clusters is 0')
