"""What docs/numbers.md says in words. Numbers in these texts are read from the results; what they mean is written here."""
from typing import Any

OPENING = ('Written by `python -m benchmarks.report` from `benchmarks/results/*.json`; no number here is typed by '
           'hand. Every section names the command, machine, commit, date, versions and seeds. A commit given by '
           '`--commit` was named by whoever started the run, on a machine without the repository\'s history. Times '
           'are medians. A target is *reached* when the measured value is at least it.')
ABOUT = {
  'Mixing': 'Time of the mixing alone (projections left out), against `jax.nn.dot_product_attention` of equal width '
            '(cuDNN on a GPU).',
  'Whole layers': 'Forward + backward of a layer with its projections. `S=K` is the default state, as many slots as '
                  'channels of a head.',
  'Recall': 'Multi-query associative recall (Arora et al. 2023), two layers without feed-forward networks. The peak '
            'rate is chosen on validation batches, the accuracy is that of fresh test batches. State is that of one '
            'layer and row; bytes include the tail of the short convolution, caches and counters.',
  'Decoding': 'Greedy decoding fed back inside one compiled scan. *attention* is the library\'s ring in float32; '
              '*plain cache* is a key-value cache in the compute dtype, written for this comparison alone.',
  'Capacity': 'Pairs that one memory recalls, beside `recall_probability`. What has no theory here is listed without '
              'a difference.',
  'Language modelling': 'Models of nearly equal numbers of parameters; the best validation loss keeps its parameters, '
                        'every test token is scored once. In each table the seeds are listed in order.',
  'Resume': 'A run killed at random instants, some while saving, continued until its end, and compared with the run '
            'left alone.',
}
CAPTIONS = {
  'mixing': 'Milliseconds of forward and backward against tokens a row',
  'recall': 'Recall accuracy against bytes of state',
  'language': 'Test scores of models with equal parameters',
}


def _row(result: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
  """The row of that name with those other values."""
  return next(r for r in result['rows'] if name in (r.get('row'), r.get('model')) and more.items() <= r.items())


def _of_layer(result, name: str, length: int) -> float:
  return next(r['times_attention'] for r in result['layers'] if r['row'] == f'layer: {name}' and r['L'] == length)


def mixing_h200(result, _):
  """What the mixing run on an H200 says."""
  rows = {(r['row'], r['L']): r['times_attention'] for r in result['rows']}
  return ('Attention wins when rows are short: at 2,048 tokens the convolution runs at '
          f'{rows["convolution dft chunk 64", 2048]:.2f}x of cuDNN attention, and elementwise binding with the default '
          f'number of slots (S=K) at {rows["elementwise chunk S=K", 2048]:.2f}x; with 8 slots a head, elementwise '
          f'binding ({rows["elementwise chunk 64", 2048]:.2f}x) and phasors ({rows["phasor chunk 64", 2048]:.2f}x) are '
          'faster there. From 8,192 on every chunked form is faster. The automatic chunk is not always the fastest, '
          'and the FFT costs about twice the matmul at every length.')


def layers_h200(result, _):
  """What the layers on an H200 say."""
  full, few = ({n: _of_layer(result, f'holographic S={s}', n) for n in (2048, 8192, 32768)} for s in ('K', '8'))
  return ('Attention wins for longer than the mixing suggests: the projections, gates and convolution of a '
          f'holographic layer cost more. With its default state it runs at {full[2048]:.2f}x, {full[8192]:.2f}x and '
          f'{full[32768]:.2f}x of an attention layer at 2,048, 8,192 and 32,768 tokens, with 8 slots a head at '
          f'{few[2048]:.2f}x, {few[8192]:.2f}x and {few[32768]:.2f}x.')


def recall_h200(result, _):
  """What recall on an H200 says."""
  get = lambda name, setting='equal': _row(result, name, setting=setting)
  default, small, linear = get('holographic'), get('small_state'), get('linear attention, full norm')
  wider = get('linear attention, 4 heads', 'curve')
  return (f'At 512 floats the default addresses reach the target ({default["accuracy"]:.3f}); the small_state preset, '
          f'by which this run judged itself, has {small["accuracy"]:.3f} and misses it; the defaults were added to the '
          'judgement afterwards, and both are listed. By all bytes carried no advantage '
          f'over linear attention can be seen: the default carries {default["state_bytes"]:,} bytes '
          f'({default["parameters"]:,} parameters), and linear attention has {linear["accuracy"]:.3f} at '
          f'{linear["state_bytes"]:,} ({linear["parameters"]:,} parameters) and {wider["accuracy"]:.3f} at '
          f'{wider["state_bytes"]:,}. Binding earns its place ({default["accuracy"]:.3f} against '
          f'{get("holographic without binding")["accuracy"]:.3f} without it, small_state {small["accuracy"]:.3f} '
          f'against {get("small_state without binding")["accuracy"]:.3f}). At width 256 every memory solves the task, '
          'so that setting tells none apart; attention solves both with a cache that grows. The delta rules depend on '
          f'the seed (worst {get("delta rule")["worst"]:.3f}). The run was started from commit c288a28 with '
          'uncommitted changes; the rows of `large` did not fit its budget.')


def recall_large_h200(result, _):
  """What the large setting says: few slots learn it in part, the defaults not at all."""
  small = _row(result, 'small_state, 16 slots')
  return (f'Trained on 4 to 64 pairs in turn, one wide head with 16 slots reaches {small["accuracy"]:.3f} '
          f'({small["worst"]:.3f} the worst seed) in {result["settings"]["large"][4]:,} steps; the default addresses '
          f'({_row(result, "holographic")["accuracy"]:.4f}) and those that keep everything stay at guessing among all values: a null '
          'result for the defaults. Linear attention, the delta rules and attention did not fit the time of this run; when all models '
          'trained on 64 pairs alone for 3,000 steps, none of them learned anything, attention included (.013).')


def recall_preset_h200(result, _):
  """What changing small_state says."""
  get = lambda name: _row(result, name, setting='preset')['accuracy']
  return (f'What lifts the small_state preset ({get("small_state"):.3f}) is signed addresses: unit-norm content routers reach '
          f'{get("content slots"):.3f}, signed ones {get("signed slots"):.3f}, above the target that the preset misses. Starting near the '
          f'identity matters most ({get("identity 0"):.3f} without it), as do the norm of the read ({get("no norm"):.3f} without) '
          f'and phases ({get("bipolar"):.3f} with bipolar keys); decay, gates and taps change little. Three rows of the list did not '
          'fit the time.')


def decode_h200(result, _):
  """What decoding on an H200 says."""
  at = lambda name, context: _row(result, name, context=context)['tokens_per_second']
  plain, ring = 'attention, plain cache', 'attention'
  return ('The target is missed: at 32,768 tokens holographic memory decodes '
          f'{at("holographic", 32768) / at(plain, 32768):.2f}x as fast as a plain bfloat16 cache, and '
          f'{at("holographic", 32768) / at(ring, 32768):.1f}x as fast as the library\'s own float32 ring. Up to 4,096 '
          f'tokens the plain cache wins ({at(plain, 1024) / at("holographic", 1024):.2f}x at 1,024), at 16,384 the two '
          'are equal. The time of holographic memory is about the same at every context and far above what moving its '
          'bytes takes, so we take it to be bound by kernel launches; no profile was made. Only one layer was run; '
          'four layers were not.')


def decode_batch64_h200(result, _):
  """What decoding in batches on an H200 says."""
  at = lambda name: _row(result, name)['tokens_per_second']
  ring = max(at('attention, plain cache'), at('attention, cuDNN'))
  bandwidth = _row(result, 'attention, cuDNN')
  return (f'The target is reached by holographic memory: {at("holographic") / ring:.0f} times the fastest cache of equal width, '
          f'{bandwidth["state_bytes"] / 1e9:.1f} GB of keys and values in bfloat16, which cuDNN reads at '
          f'{bandwidth["state_bytes"] / bandwidth["us_per_token"] / 1e6:.1f} TB/s. The neural memory, whose state is large, reaches '
          f'{at("neural") / ring:.1f} times. One layer without feed-forward network.')


def shakespeare_h200(result, _):
  """What the default model on Shakespeare says."""
  bits = lambda name: _row(result, name)['bits_per_byte']
  return (f'Attention ({bits("attention"):.3f}) and the hybrid ({bits("hybrid"):.3f}) are within the spread of the '
          f'seeds, {_row(result, "attention")["spread"]:.3f}, and so is holographic memory alone '
          f'({bits("holographic"):.3f}). Without binding the hybrid has {bits("hybrid, no binding"):.3f}: each seed '
          'worse than every seed of the hybrid, by about the spread of its own '
          f'({_row(result, "hybrid, no binding")["spread"]:.3f}). 500 steps, one peak rate: a small run, not a ranking.')


def wikitext2_h200(result, results):
  """What WikiText-2 says."""
  score = lambda name: _row(result, name)['perplexity']
  alone = results.get('language-wikitext2-holographic-h200')
  third = f' Holographic memory alone ({_row(alone, "holographic")["perplexity"]:.0f}) was run apart.' if alone else ''
  return (f'Attention wins: perplexity {score("attention"):.1f} against {score("hybrid"):.1f} for the hybrid, every '
          f'seed of the one below the mean of the other.{third} The best step is the last one, so early stopping '
          'never acted and both were still improving; one peak rate. Without binding nothing was run on this text.')


def wikitext2_alone_h200(result, _):
  """What holographic memory alone on WikiText-2 says."""
  return ('Run apart from the hybrid and attention, whose result lacks this third model: same options, but evaluated '
          'every 1,000 steps, not 400, ended at 5,000 steps, not 5,200, and of a commit a little later. The distance '
          'to the others is larger than the seeds\' spread.')


READINGS = {
  ('Mixing', 'holographic-h200'): mixing_h200, ('Whole layers', 'holographic-h200'): layers_h200, ('Recall', 'recall-h200'): recall_h200,
  ('Recall', 'recall-large-h200'): recall_large_h200, ('Recall', 'recall-preset-h200'): recall_preset_h200,
  ('Decoding', 'decode-h200'): decode_h200, ('Decoding', 'decode-batch64-h200'): decode_batch64_h200,
  ('Language modelling', 'language-shakespeare-default-h200'): shakespeare_h200,
  ('Language modelling', 'language-wikitext2-h200'): wikitext2_h200,
  ('Language modelling', 'language-wikitext2-holographic-h200'): wikitext2_alone_h200,
}
