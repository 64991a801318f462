"""Bad text, token and tokenizer input as (name, act, part of the line), for the table of tests/test_bad_input.py."""
import jax
import numpy as np

from memjax.config.schema import Config, DataConfig, TokenizerConfig, TrainingConfig
from memjax.data.messages import load_chats
from memjax.data.pipeline import eval_batches, train_batches
from memjax.data.sources import load_corpus
from memjax.data.synthetic import mqar
from memjax.data.tokenizers import ByteTokenizer, WordTokenizer, load_tokenizer, make_tokenizer
from memjax.data.tokens import Tokens, tokenize_split


def text(content, name='train.txt', split='train', **fields):
  """Reads a folder that holds one file (none where the content is None)."""
  def act(place):
    folder = place / 'text'
    folder.mkdir()
    if content is not None: (folder / name).write_bytes(content)
    load_corpus(DataConfig(source='path', path=str(folder), **fields), split)
  return act


def chats(content, name='train.jsonl'):
  """Reads a folder of conversations that holds one file."""
  def act(place):
    (place / 'chats').mkdir()
    (place / 'chats' / name).write_bytes(content)
    load_chats(DataConfig(source='path', path=str(place / 'chats')), 'train')
  return act


def silent(place):
  """Rows that end before the reply."""
  weight_N = np.arange(9) == 8
  given = Tokens(np.zeros(9, np.uint8), np.zeros(1, np.int64), 9, '', 256, 10, 'talk', 'train', weight_N=weight_N)
  train_batches(given, Config(data=DataConfig(order='packed'), training=TrainingConfig(batch=4, length=7)))


def tokens(count): return Tokens(np.zeros(count, np.uint8), np.zeros(1, np.int64), count, '', 256, 10, 'text', 'train')


def train(count, order, processes=1):
  config = Config(data=DataConfig(order=order), training=TrainingConfig(batch=4, length=8))
  return lambda place: train_batches(tokens(count), config, process_count=processes) and None


def evaluate(**sizes): return lambda place: eval_batches(tokens(9), batch=1, length=8, **sizes) and None


def tokenizer(**fields): return lambda place: make_tokenizer(DataConfig(tokenizer=TokenizerConfig(**fields)), ['text'])


def saved(content):
  def act(place):
    (place / 'meta.json').write_text(content)
    load_tokenizer(place)
  return act


def cache(place):
  (place / 'file').write_text('')
  tokenize_split(DataConfig(cache=str(place / 'file')), ByteTokenizer(), 'val')


def recall(**sizes):
  return lambda place: mqar(jax.random.key(0), **{'batch': 1, 'length': 64, 'pairs': 8, 'vocabulary': 64, **sizes})


DATA = [
    ('text: missing', lambda place: load_corpus(DataConfig(source='path', path=str(place / 'no.txt')), 'train'),
     'no such file or folder: PLACE/no.txt'),
    ('text: unknown split', lambda place: load_corpus(DataConfig(), 'holdout'), "unknown split 'holdout'"),
    ('text: empty folder', text(None), 'PLACE/text holds no text files'),
    ('text: empty file', text(b''), 'PLACE/text/train.txt is empty'),
    ('text: not UTF-8', text(b'abc\xff'), 'PLACE/text/train.txt is not UTF-8 at byte 3 (0xff)'),
    ('text: UTF-16', text('abc'.encode('utf-16')), 'not UTF-8 at byte 0'),
    ('text: no such split', text(b'abc', split='test'), 'PLACE/text has no test split; it has train.txt'),
    ('text: nothing to divide', text(b'a', 'book.txt'), 'the train split of text is empty'),
    ('text: row not JSON', text(b'{', 'train.jsonl'), 'train.jsonl line 1 is not JSON'),
    ('text: row without text', text(b'{"body": ""}', 'train.jsonl'), "line 1 has no text in column 'text'; it has body"),
    ('text: shorter than a row', train(7, 'shuffle'), 'has 7 tokens; one row of 8 tokens needs 8'),
    ('text: shorter than its lanes', train(31, 'lanes'), 'has 31 tokens; 4 lanes of at least 8 tokens needs 32'),
    ('batch over processes', train(99, 'shuffle', 3), 'a batch of 4 rows does not divide over 3 processes'),
    ('context fills the row', evaluate(context=8), 'leaves nothing to score in rows of 8'),
    ('context of a stream', evaluate(context=2, stream=True), 'context does not apply to a stream'),
    ('chats: no conversation', chats(b'{"text": "a"}'), 'train.jsonl line 1: no conversation: neither messages, nor'),
    ('chats: no role', chats(b'{"messages": [{"content": "a"}]}'), 'PLACE/chats/train.jsonl line 1: message 1 has no role'),
    ('chats: not UTF-8', chats(b'\xff'), 'PLACE/chats/train.jsonl is not UTF-8 at byte 0'),
    ('chats: text', chats(b'a', 'train.txt'), 'PLACE/chats holds no text files (.jsonl)'),
    ('chats: no reply in a row', silent, 'no conversation in the train split of talk has a reply within 8 tokens'),
    ('cache is a file', cache, 'cannot use PLACE/file for token files'),
    ('token out of range', lambda place: ByteTokenizer().decode([65, 256]), 'token 256 is outside the vocabulary of 256'),
    ('token below zero', lambda place: ByteTokenizer().decode([-1]), 'token -1 is outside the vocabulary of 256'),
    ('surrogates', lambda place: ByteTokenizer().encode('a\udcff'), 'not valid Unicode at character 1'),
    ('unknown word', lambda place: WordTokenizer.train(['a\n']).encode('a b'), "word 'b' is not in the vocabulary"),
    ('bpe too small', tokenizer(kind='bpe', size=256), 'tokenizer size 256 is too small'),
    ('tokenizer.json missing', tokenizer(kind='file', path='no/tokenizer.json'), 'cannot read the tokenizer no/tok'),
    ('tokenizer.json of another kind', lambda place: tokenizer(kind='file', path=str(place / 'run.json'))(place),
     'PLACE/run.json is no tokenizer.json'),
    ('saved tokenizer missing', lambda place: load_tokenizer(place / 'no'), 'cannot read the tokenizer PLACE/no'),
    ('saved tokenizer cut', saved('{"name": "by'), 'meta.json is damaged'),
    ('saved tokenizer of another kind', saved('{"name": "runes", "fingerprint": ""}'), "unknown kind of tokenizer 'runes'"),
    ('saved tokenizer changed', saved('{"name": "bytes", "fingerprint": "00"}'), 'meta.json is damaged'),
    ('recall too short', recall(length=31), '8 pairs and 8 queries need a length of 32, got 31'),
    ('recall vocabulary', recall(vocabulary=17), '8 pairs need a vocabulary of 18, got 17'),
]
