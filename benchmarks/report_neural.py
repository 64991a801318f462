"""The sections of docs/numbers.md on memories that learn at test time: one layer, needles, text, a long stream."""
import itertools
import math
from typing import Any

ABOUT = {
  'Neural memory': 'One layer of memory that learns at test time, projections included (`benchmarks/neural_memory.py`). Rows compute '
                   'different functions, and the table says which; the peer is run in float32, as its users run it.',
  'Needles': 'A needle in a haystack, after the single-needle tasks of RULER, at lengths beyond that of training. An answer counts '
             'when all its tokens are right. Models have nearly equal numbers of parameters. *frozen*: no step sizes; *off*: what the '
             'memory reads is zero; both with the parameters as trained. The memory of *MAC* learns from what attention found plus the '
             'input (`write=\'sum\'`), that of *MAC, input* from the input alone, that of the first run from what attention found.',
  'Learning at test time': 'Bytes of a text, models with nearly equal numbers of parameters, scored along contiguous lanes with the '
                           'state carried. *frozen*, *off*, *MAC* and *MAC, input* as for needles.',
  'Long stream': 'Random tokens through memories whose state has a fixed size; then single tokens from the state after 10,000 tokens '
                 'and from that at the end, in turn, and calls of the parallel form likewise.',
}
CAPTIONS = {'needle': 'Answers right against tokens a row, one panel for each kind of needle',
            'titans': 'Validation loss over steps, mean of the seeds'}
KINDS = ('passkey', 'number', 'word')


def neural(result: dict[str, Any], table, cell) -> list[str]:
  """A row each mode and chunk."""
  text, apart = f'{result["tokens"]:,} tokens, width {result["width"]}, {result["heads"]} heads.', result.get('differences', {})
  names = [{'name': name, **{chunk: found[name] for chunk, found in apart.items()}} for name in next(iter(apart.values()), ())]
  shares = {f'chunks of {chunk}': lambda r, chunk=chunk: f'{100 * r[chunk]:.2f} %' for chunk in apart}
  compared = ['The kernels against XLA: root mean square difference of the output, and of the gradients of the input and of parameters, as '
              'a share of their size.', *table(names, {'': 'name', **shares})] if apart else []
  return [text, *table(result['rows'], {
      'row': 'row', 'mode': 'mode', 'computes': 'computes', 'chunk': 'chunk', 'tokens a row': 'length', 'dtype': 'dtype',
      'layers': lambda r: r.get('depth'), 'pass': 'pass', 'ms': 'ms', 'fastest ms': 'min_ms', 'calls in a row, ms': 'in_a_row_ms',
      'peak GiB': lambda r: cell(r['peak_gib']), 'compile s': 'compile_s'}), *compared]


def needle(result: dict[str, Any], table) -> list[str]:
  """A row each model with its memory learning, frozen and off: answers right by length, mean over seeds."""
  o, chance = result['options'], result['chance']
  text = (f'Trained on {o["length"]:,} tokens, {o["steps"]:,} steps of {o["batch"]} rows, width {o["width"]}, {o["layers"]} layers, '
          f'{o["heads"]} heads, window {o["window"]}, chunk {o["chunk"]}; step sizes of deep memories base {o["base"]:g}, '
          f'bias {o["bias"]:g}; fuse {o.get("fuse", "double_sigmoid")}; '
          f'{"neural memories store the value of a token under the key of the one before; " if o["lookahead"] else ""}'
          f'chance: {", ".join(f"{kind} {value:g}" for kind, value in chance.items())}. Each cell: {" / ".join(KINDS)}.')
  rows = []
  for row in result['rows']:
    for way in ('on', 'frozen', 'off'):
      tests = {t['length']: t for t in row['tests'] if t['test_time'] == way}
      if tests: rows.append({**row, 'way': way, 'tests': tests, 'at': tests.get(4 * o['length'])})
  lengths = sorted({length for row in rows for length in row['tests']})
  def share(row, length):
    return ' / '.join(f'{row["tests"][length][kind]:.2f}' for kind in KINDS) if length in row['tests'] else None
  worst = lambda at: min((sum(seed) / len(seed) for seed in at['seeds']), default=None) if at else None
  asked = lambda row: next(iter(row['tests'].values())).get('questions')
  return [text, *table(rows, {
      'model': 'model', 'parameters': 'parameters', 'rate': lambda r: f'{r["rate"]:g}', 'test time': 'way',
      **{f'{n:,}': lambda r, n=n: share(r, n) for n in lengths}, 'mean at 4x': lambda r: float(r['at']['accuracy']) if r['at'] else None,
      'worst seed at 4x': lambda r: worst(r['at']), 'questions a kind and seed': asked})]


def titans(result: dict[str, Any], table, cell) -> list[str]:
  """A row each model: bits per byte of the test text with its memory learning, frozen and off."""
  o, chance, steps = result['options'], math.log2(result['vocabulary']), result['rows'][0]['steps']
  text = (f'{result["bytes"]["train"]:,} training bytes, {result["bytes"]["test"]:,} in the test text; width {o["width"]}, {o["layers"]} '
          f'layers, {o["heads"]} heads, window {o["window"]}, chunk {o["chunk"]}, {steps:,} steps of {o["batch"]} x {o["length"]}, '
          f'step sizes of deep memories base {o["base"]:g}, bias {o["bias"]:g}; fuse {o.get("fuse", "double_sigmoid")}. '
          f'Guessing evenly takes {cell(chance)} bits.')
  scale = result['tokens']['test'] / result['bytes']['test'] / math.log(2)
  def bits(row, how):
    chosen = [nll for nll, (rate, _) in zip(row['test_nll'].get(how, []), row['members'], strict=False) if rate == row['rate']]
    return [nll * scale for nll in chosen]
  mean = lambda row, how: cell(sum(bits(row, how)) / len(bits(row, how)), 4) if bits(row, how) else None
  return [text, *table(result['rows'], {
      'model': 'model', 'parameters': 'parameters', 'rate': lambda r: f'{r["rate"]:g}', 'bits per byte': lambda r: mean(r, 'carried'),
      'of the seeds': lambda r: ', '.join(cell(b, 4) for b in bits(r, 'carried')), 'frozen': lambda r: mean(r, 'frozen'),
      'off': lambda r: mean(r, 'off'), 'tokens/s': 'tokens_per_second'})]


def longstream(result: dict[str, Any], table) -> list[str]:
  """A row each model."""
  o = result['options']
  return [f'{o["tokens"]:,} tokens, width {o["width"]}, {o["layers"]} layer{"s" * (o["layers"] > 1)}, {o["heads"]} heads.', *table(
      result['rows'], {
          'model': 'model', 'state bytes': 'state_bytes', 'constant': lambda r: 'yes' if r['constant'] else '**no**',
          'finite': lambda r: 'yes' if r['finite'] else '**no**', 'seconds': 'seconds',
          **{f'{form}, us a token {when}': lambda r, form=form, when=when: r[form][f'{when}_us']
             for form in ('decode', 'parallel') for when in ('early', 'late')}})]


def draw_needle(results, figure, styles) -> bool:
  """Accuracy over length, a panel for each kind, mean over seeds."""
  found = [r for r in results.values() if r['benchmark'].startswith('needle') and r['machine']['platform'] == 'gpu']
  if not found: return False
  for axes, kind in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
    for row, (colour, marker) in zip(found[0]['rows'], itertools.cycle(styles.values())):
      line = [(t['length'], t[kind]) for t in row['tests'] if t['test_time'] == 'on']
      axes.plot(*zip(*line, strict=True), color=colour, marker=marker, label=row['model'])
    axes.axhline(found[0]['chance'][kind], color='#777777', linewidth=1, linestyle='--')
    axes.set(xscale='log', title=kind, xlabel='tokens a row', ylim=(-0.03, 1.03))
    axes.set_xticks([n for n, _ in line], [f'{n / 1024:g}k' for n, _ in line], fontsize=9)
    axes.minorticks_off()
  figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=4)
  return True


def draw_titans(results, figure, styles) -> bool:
  """Validation loss over steps, a panel for each text."""
  found = {r['benchmark'].partition('-')[2]: r for r in results.values()
           if r['benchmark'].startswith('titans-') and r['machine']['platform'] == 'gpu'}
  if not found: return False
  for axes, (name, result) in zip(figure.subplots(1, len(found), squeeze=False)[0], sorted(found.items()), strict=True):
    for row, (colour, marker) in zip(result['rows'], itertools.cycle(styles.values())):
      axes.plot([p['step'] for p in row['curve']], [sum(p['valid']) / len(p['valid']) / math.log(2) for p in row['curve']], color=colour,
                marker=marker, label=row['model'])
    axes.set(title=name, xlabel='step', ylabel='validation, bits per byte')
  figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=4)
  return True


def fused_h200(result, results):
  """What fused kernels gave, in a run without the peer."""
  found = {(r['mode'], r['chunk'], r['length'], r['dtype']): r for r in result['rows'] if r['depth'] == 2}
  at64, wide = found['token', 64, 2048, 'bfloat16'], found['token', 64, 2048, 'float32']
  refreshed = next(r for r in results['neural_memory-h200']['rows'] if r['mode'] == 'refreshed')
  return (f'{at64["in_a_row_ms"]:.2f} ms at chunk 64, which is the best chunk, in calls that follow each other (targets: 20 at 64, 12 at '
          f'the best; 8, asked for later); {at64["ms"]:.2f} where the host waits for the device after every call, most of which more is '
          f'its own; {refreshed["ms"] / at64["ms"]:.0f} times faster than titans-pytorch with weights refreshed every chunk in '
          'the earlier run. What came from where: reads of all chunks at once instead of in the scan 28.2 to 19.2 ms, kernels of '
          'the writes and streams laid out by rows to 14.0, gradients of the coefficients by sums and kernels of the reads to '
          '12.9, narrow gradients of the convolution to 12.0, writes tile by tile and kernels of streams and coefficients to 10.1, the '
          'shape of the programs of each kernel to 9.6, reads that load each array once and states kept in the second-level cache to 8.8 '
          '(8.1 in a row), the order in which programs are handed out and loads ahead of their products to 7.7 in a row, what gradients '
          'of streams and coefficients need kept or summed at once to 7.6, norm and gate of heads in one kernel and momenta left to the '
          'second-level cache itself to this; details in [performance](performance.md#the-neural-layer). In '
          f'float32, without kernels, {wide["ms"]:.1f} ms. Memory: {at64["peak_gib"]:.2f} GiB; for up to 2 GiB of memories '
          'nothing is recomputed. Networks of four layers have no kernels.')


def compare_h200(result, _):
  """A second run of two rows, with the comparison."""
  at64 = result['rows'][0]
  return (f'Minutes later on the same machine: {at64["in_a_row_ms"]:.2f} ms in a row and {at64["ms"]:.2f} with waits at chunk 64; and how '
          'far the kernels are from XLA at that chunk. At chunks of 128 XLA reads, and kernels write.')


def h200(result, _):
  """What a layer on an H200 says."""
  rows = {(r['mode'], r['chunk']): r for r in result['rows'] if r['pass'] == 'both'}
  at64, refreshed = rows['token', 64], rows['refreshed', 64]
  best = min((r for (mode, _), r in rows.items() if mode == 'token'), key=lambda r: r['ms'])
  return (f'Before the fused kernels: {at64["ms"]:.1f} ms at chunk 64, {best["ms"]:.1f} ms at the best chunk of those tried; '
          f'{refreshed["ms"] / at64["ms"]:.0f} times faster than titans-pytorch with weights refreshed every chunk (target 18), '
          f'{refreshed["ms"] / best["ms"]:.0f} times at chunk {best["chunk"]}. Memory is met: {at64["peak_gib"]:.2f} GiB of temporaries. '
          'Tried on the mixing alone, bf16, forward + backward at chunks of 64 / 128 / 256: first form 35.7 / 27.4 / 27.4 ms; loops '
          'unrolled by four 30.1 / 20.8 / -; levels of the memory apart and row masks instead of full ones in the gradient '
          '29.2 / 21.3 / 21.0; the narrow side of each product scaled and hidden channels kept in bf16 23.2 / 17.7 / 15.7. Keeping all '
          'instead of recomputing took 47.0 / 33.6 / 25.3 before these changes, and five times the memory; '
          'putting loops into CUDA graphs changed nothing. A later profile showed the card busy throughout: the time is '
          'in some hundred kernels a chunk, each of which moves little.')


def _accuracy(result):
  """{(model, way, length): accuracy, mean of the kinds and seeds}."""
  return {(r['model'], t['test_time'], t['length']): t['accuracy'] for r in result['rows'] for t in r['tests']}


def needle_h200(result, results):
  """What the needles on an H200 say."""
  at, length, rows = _accuracy(result), result['options']['length'], {r['model']: r for r in result['rows']}
  names = ('window + linear exact', 'MAC, input', 'MAL', 'LMM', 'MAG', 'MAC', 'attention', 'window')
  right = lambda model, times: f'{at[model, "on", times * length]:.2f}'
  seeds = lambda model: [sum(seed) / len(seed) for t in rows[model]['tests'] if (t['test_time'], t['length']) == ('on', 4 * length)
                         for seed in t['seeds']]
  held = max(accuracy for (_, way, _), accuracy in at.items() if way != 'on')
  lost = ', '.join(f'{x:.2f}' for x in rows['MAC']['by_rate']['0.003'])
  text = (f'At four times the length of training, mean of the three kinds: {", ".join(f"*{name}* {right(name, 4)}" for name in names)}. '
          f'The target (.9 for MAC) is reached by the MAC whose memory learns from the input: {right("MAC, input", 4)}, '
          f'its worst seed {min(seeds("MAC, input")):.2f}; at 64 times the length {right("MAC, input", 64)}. *MAC* stores what attention '
          f'found plus the input: it learns, but later, {right("MAC", 4)} of the answers with seeds from '
          f'{min(seeds("MAC")):.2f} to {max(seeds("MAC")):.2f}, and at the higher of its two rates two of three seeds found nothing at the '
          f'length of training ({lost}). The linear memory beside a window is best at every length '
          f'({right("window + linear exact", 64)} at 64 times). Frozen or off, no model exceeds {held:.2f}. ')
  return text + _before(result, results) + ('Both MACs were given two rates, between which validation chose, the others one. '
                                            'The processes shared two cards, so times mean nothing.')


def _before(result, results):
  """What changed since the first run."""
  old = _accuracy(results['needle-product-h200'])
  then = lambda model: f'{old[model, "on", 4 * result["options"]["length"]]:.2f}'
  return ('Against the first run (below): reads are joined by a learned mean (`fuse=\'mix\'`) instead of a product, and there are '
          f'{result["options"]["steps"]:,} steps instead of {results["needle-product-h200"]["options"]["steps"]:,}; which of the two '
          f'lifted MAG from {then("MAG")} and the linear memory from {then("window + linear exact")} was not taken apart. MAC as in the '
          f'paper, whose memory learns from what attention found alone, was not run again ({then("MAC")} there). '
          'In small runs of one layer on a CPU that form learned late, and sooner when query and key maps were equal at the start, so that '
          'attention looks at its own token: until it does, every token tells the memory nearly the same mean. ')


def needle_product_h200(result, _):
  """What the first run of the needles said."""
  at = _accuracy(result)
  names = ('LMM', 'MAL', 'window + linear exact', 'MAG', 'attention', 'window + holographic', 'window', 'MAC')
  right = lambda model, times: f'{at[model, "on", times * result["options"]["length"]]:.2f}'
  return (f'The first run, with the default product as fuse and MAC as in the paper. At four times the length of training: '
          f'{", ".join(f"{name} {right(name, 4)}" for name in names)}. Attention and the holographic memory were trained at a third of the '
          'rate of the others. The process of MAL was stopped before it saved: its row is read from what it had printed, without seeds.')


def decode_neural_h200(result, _):
  """What decoding with neural memory on an H200 says."""
  at = {(r['row'], r['context']): r for r in result['rows']}
  before, last = sorted({context for _, context in at})[-2:]
  speed = lambda row: at[row, last]['tokens_per_second']
  plain = 'attention, plain cache'
  slope = (at[plain, last]['us_per_token'] - at[plain, before]['us_per_token']) / (last - before)
  even = last + (at['neural', last]['us_per_token'] - at[plain, last]['us_per_token']) / slope
  return (f'Constant in the context, but at {last:,} tokens the plain bfloat16 cache of one layer still decodes '
          f'{speed(plain) / speed("neural"):.2f} times as fast; the library\'s own float32 ring is '
          f'{speed("neural") / speed("attention"):.1f} times slower. By its slope the plain cache would fall behind near '
          f'{round(even, -4):,.0f} tokens. A step of the memory takes as long at every size tried, far longer than moving its bytes: we '
          'take it to be bound by kernel launches.')


def titans_h200(result, _):
  """What a text on an H200 says."""
  score = {r['model']: r['bits_per_byte'] for r in result['rows']}
  nll = {r['model']: {how: sum(v) / len(v) for how, v in r['test_nll'].items()} for r in result['rows']}
  scale = result['tokens']['test'] / result['bytes']['test'] / math.log(2)
  worth = lambda model, way: f'{(nll[model][way] - nll[model]["carried"]) * scale:.2f}'
  spread = {r['model']: r['spread'] for r in result['rows']}
  exact, holographic, o = 'window + linear exact', 'window + holographic', result['options']
  deep = ('MAC', 'MAG', 'MAL', 'MAC, input', 'LMM')
  read = result['rows'][0]['steps'] * o['batch'] * o['length'] / result['tokens']['train']
  return (f'The simplest memories help a window most: {score[exact]:.2f} bits with the linear one and {score[holographic]:.2f} with the '
          f'holographic one against {score["window"]:.2f} (its seeds spread by {spread["window"]:.2f}). Of the deep ones '
          f'{", ".join(f"*{name}* has {score[name]:.2f}" for name in deep)}; LMM has no attention, and that of both MACs sees its '
          'segment alone. What they learn while reading is worth '
          f'{worth("LMM", "frozen")} bits to LMM and {worth(exact, "frozen")} to the linear memory, but only {worth("MAC", "frozen")} to '
          f'MAC, {worth("MAG", "frozen")} to MAG, {worth("MAL", "frozen")} to MAL and {worth("MAC, input", "frozen")} to *MAC, input*: '
          'beside attention over near tokens a deep memory served here mostly as a network that stays as it is. Off, all lose more than '
          f'{min(nll[name]["off"] - nll[name]["carried"] for name in (*deep, exact, holographic)) * scale:.1f} bits. '
          f'A small run: one rate for all, step sizes not tuned, {100 * read:.0f} % of the training text read once.')


def titans_sotu_cpu(result, _):
  """What the text on two CPU cores says."""
  score = {r['model']: f'{r["bits_per_byte"]:.2f}' for r in result['rows']}
  nll = {r['model']: {how: sum(v) / len(v) for how, v in r['test_nll'].items()} for r in result['rows']}
  worth = lambda way: f'{(nll["LMM"][way] - nll["LMM"]["carried"]) / math.log(2):.2f}'
  return (f'A toy, for the one deep memory that could be run: LMM {score["LMM"]}, which has no attention at all, the window alone '
          f'{score["window"]}, with the linear memory {score["window + linear exact"]}. Frozen, LMM loses {worth("frozen")} bits, switched '
          f'off {worth("off")}. One seed and {result["rows"][0]["steps"]} steps on parts of the text (the first 3,000,000, 30,000 and '
          '60,000 characters): no ranking.')


def recall_neural_cpu(result, _):
  """What recall of the linear memory on two CPU cores says."""
  got = {r['row']: r['accuracy'] for r in result['rows']}
  return ('Which pairs are stored decides here: with the value of a token under the key of the token before it the linear memory recalls '
          f'{got["neural exact, look-ahead"]:.2f}; where the convolution has to learn that shift, {got["neural exact, 8 heads"]:.2f} '
          'after as many steps, hardly above guessing. One seed and half the steps of the other settings; the two rows were run one after '
          'the other.')


def recall_neural_h200(result, _):
  """What recall of deep and linear memories on an H200 says."""
  got = {r['row']: (r['accuracy'], r['state_floats']) for r in result['rows']}
  say = lambda row: f'{got[row][0]:.3f}'
  return (f'Deep memories recall nearly everything: {say("neural deep, look-ahead")} with the value of a token under the key of the one '
          f'before, {say("neural deep, 4 heads")} where the convolution learns that shift. The linear memory needs the help '
          f'({say("neural exact, look-ahead")} against {say("neural exact, 8 heads")}). One rate; the deep ones hold '
          f'{got["neural deep, 4 heads"][1] / got["neural exact, 8 heads"][1]:.1f} times the floats of the linear ones, and those many '
          'more than the memories of the table *equal*, so that this is no comparison at equal state.')


READINGS = {('Recall', 'recall-neural-cpu'): recall_neural_cpu, ('Recall', 'recall-neural-h200'): recall_neural_h200,
            ('Learning at test time', 'titans-sotu-cpu'): titans_sotu_cpu,
            ('Learning at test time', 'titans-sotu-h200'): titans_h200, ('Learning at test time', 'titans-wikitext2-h200'): titans_h200,
            ('Neural memory', 'neural_memory-h200'): h200, ('Neural memory', 'neural_memory-fused-h200'): fused_h200,
            ('Neural memory', 'neural_memory-compare-h200'): compare_h200,
            ('Needles', 'needle-h200'): needle_h200, ('Needles', 'needle-product-h200'): needle_product_h200,
            ('Decoding', 'decode-neural-h200'): decode_neural_h200}
