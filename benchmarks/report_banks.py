"""The sections of docs/numbers.md on memory banks: comparison on text, and routed attention."""
from typing import Any

ABOUT = {
  'Memory banks': 'A bank of learned entries, shared by its layers and read in chapters, against transformers without one '
                  '(`benchmarks/banks.py`). Operations are forward, a token, at the batch of training, whose rows share keys and values. '
                  '*bank, sequence* routes by the mean of the whole window, as published runs did: the score as trained sees the future, '
                  'the causal one is that of the same parameters routed by the mean of the past.',
  'Routed attention': 'Token-level routing to chapters of a bank (`ops/routed_attention`): every implementation gives the same numbers.',
}


CAPTIONS = {'banks': 'Validation loss and test scores of banks and transformers; the leaking router once it is causal'}


def banks(result: dict[str, Any], table, cell) -> list[str]:
  """A row each model: sizes, test scores, causal scores where they differ."""
  o = result['options']
  text = (f'{result["tokens"]["train"]:,} training {o["tokens"]}, {result["tokens"]["test"]:,} in the test text; width {o["width"]}, '
          f'{o["layers"]} layers, a bank of {o["entries"]:,} entries in {o["chapters"]} chapters read by every {o["every"]}nd layer, '
          f'top {o["top_k"]}; {o["batch"]} x {o["length"]} a step, {o["steps"]:,} steps, peak rate(s) {", ".join(map(str, o["rates"]))}, '
          f'dropout {o["dropout"]}.')
  words = o['tokens'] == 'words'
  seeds = 'perplexity_seeds' if words else 'bits_per_byte_seeds'
  columns = {
      'model': 'model', 'parameters': 'parameters', 'operations a token': lambda r: round(r['flops_a_token']),
      'test bits per byte': lambda r: cell(r['bits_per_byte'], 4), 'test perplexity per token': lambda r: cell(r['perplexity'], 4),
      'of the seeds': lambda r: ', '.join(cell(v, 4) for v in r[seeds]),
      'causal bits per byte': lambda r: cell(r['causal_bits_per_byte'], 4) if 'causal_bits_per_byte' in r else None,
      'causal perplexity': lambda r: cell(r['causal_perplexity'], 4) if 'causal_perplexity' in r else None,
      'tokens/s': 'tokens_per_second'}
  return [text, *table(result['rows'], columns)]


def routed(result: dict[str, Any], table, cell) -> list[str]:
  """Tables of what this run measured: against the plain gather, memory compiled, whole layers, errors of the device's path."""
  lines: list[str] = []
  size = lambda name: '{} tokens, {} chapters of {} entries, {} a token, {} heads ({} key heads) of {}'.format(*result[name])
  if result.get('small'):
    lines += [f'{size("small_shape")}, fp32 mixture:', *table(result['small'], {
        'pass': 'pass', 'row': 'row', 'ms': 'ms', 'times the plain gather': 'times_naive', 'temporary MiB': 'temporary_mib'})]
  if result.get('memory'):
    lines += [f'{size("example_shape")}, bf16, compiled and not run:', *table(result['memory'], {
        'row': 'row', 'key heads': 'G', 'pass': 'pass', 'temporary GiB': 'GiB'})]
  if result.get('layer'):
    lines += [f'{size("example_shape")}, {result["dtype"]}, forward + backward:', *table(result['layer'], {
        'row': 'row', 'key heads': 'G', 'pass': 'pass', 'ms': 'ms', 'transformer layers': 'times_layer',
        'TFLOP/s of the attention': 'TFLOP/s', 'temporary MiB': 'temporary_mib'})]
  if result.get('probe'):
    lines += ['Largest error, relative to the largest entry, of values and gradients against gathered fp32:', *table(result['probe'], {
        'combination': 'mode', 'row': 'row', 'worst': lambda r: cell(r['worst'], 2) if 'worst' in r else r.get('error', '')})]
  return lines


def _score(result: dict[str, Any], name: str, field: str) -> float:
  return next(r for r in result['rows'] if r['model'] == name)[field]


def sotu_h200(result, _):
  """What the bank on speeches says."""
  bits = lambda name, field='bits_per_byte': _score(result, name, field)
  return (f'**The bank does not pay here.** Causal token routing ({bits("bank, token"):.3f} bits per byte) loses to a transformer of equal '
          f'parameters ({bits("vanilla, equal parameters"):.3f}, every seed) and is level with one of equal operations, which has fewer '
          f'parameters ({bits("vanilla, equal FLOPs"):.3f}). **The leak:** a router that sees the whole window looks like the best model '
          f'({bits("bank, sequence"):.3f}); routed by the past alone, the same parameters come last '
          f'({bits("bank, sequence", "causal_bits_per_byte"):.3f}). Its gain was the future. One size, one recipe, 1,500 steps. The first '
          'two rows were run at commit 14509aa, the others at 90aa2ee.')


def wikitext2_h200(result, _):
  """What the bank on WikiText-2 says."""
  score = lambda name, field='perplexity': _score(result, name, field)
  return (f'Perplexity {score("bank, token"):.1f} with the bank, {score("vanilla, equal parameters"):.1f} for a transformer of equal '
          f'parameters, {score("vanilla, equal FLOPs"):.1f} for one of equal operations and fewer parameters: within the spread of the '
          f'seeds of the second, no gain from the bank. The leaking router has {score("bank, sequence"):.1f} as trained and '
          f'{score("bank, sequence", "causal_perplexity"):.1f} once causal: on words its use of the future is small. A transformer with '
          f'the operations of a bank whose keys and values are made for one row alone has {score("vanilla, equal FLOPs of one row"):.1f}. '
          'Three rows were run at commit 14509aa, the two others at 90aa2ee.')


def routed_h200(result, _):
  """What routed attention on an H200 says."""
  at = lambda name, G=12, what='times_layer', how='both': next(
      r[what] for r in result['layer'] if r['row'] == name and r.get('G', 12) == G and r['pass'] == how)
  share = 100 * at('attention alone, auto', what='ms') / at('memory layer, auto', what='ms')
  return (f'The target (two transformer layers at most) is missed: a memory layer takes {at("memory layer, auto"):.2f} of them with a '
          f'softmax in each chapter ({at("memory layer, kept partials"):.2f} when partial results are kept), '
          f'{at("memory layer, joint"):.2f} with one softmax over all, {at("memory layer, kept partials", 2):.2f} with 2 key heads. '
          'Where it goes: the attention alone needs 28.9 TFLOP forward and backward, 1.2 times all of the transformer layer, and is '
          f'{share:.0f} % of the time. Forward it runs at {at("attention alone, auto", what="TFLOP/s", how="forward"):.0f} TFLOP/s, with '
          f'the backward pass (which computes the partial results of each chunk again) at '
          f'{at("attention alone, auto", what="TFLOP/s"):.0f}; the form that combines inside cuDNN reaches '
          f'{at("memory layer, joint", what="TFLOP/s"):.0f}. Larger chunks and blocks were tried and change little; a router that prefers '
          f'some chapters makes the rounds ragged ({at("memory layer, skewed"):.2f}). The same through plain XLA tiles takes '
          f'{at("attention alone, XLA tiles", 2):.1f} transformer layers for the attention alone. No Pallas kernel was written: cuDNN on '
          'chapters as its batch came first, and beats the tiles.')


READINGS = {('Memory banks', 'banks-sotu-h200'): sotu_h200, ('Memory banks', 'banks-wikitext2-h200'): wikitext2_h200,
            ('Routed attention', 'routed-h200'): routed_h200}
