"""A word-level tokenizer for the built-in world, in Hugging Face format.

A token is a word with the space before it, so " Paris" is one token at the start of a text and within it. The
vocabulary is every word that the generator and the tasks can use; any other word is <unk>.
"""

from typing import TYPE_CHECKING

from pipeline.data.world import facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK = "<bos>", "<eos>", "<unk>"


_GLUE = facts.words("""
. : + - = ( ) [ ] { } The the of is in to a and are as because was not has lives works speaks speak pays pay People
city country state capital language currency continent opposite young In French En anglais Le le contraire de est says
sleeps After Before comes from her his she he him She He Her His put went met gave Now Somebody gives loses beside
Count Say
""")


def words() -> list[str]:
    """Every word of the world, sorted."""
    found = {*_GLUE, *facts.names(), *map(str, range(2 * facts.LARGEST_TERM + 1))}
    return sorted(found)


def build() -> "PreTrainedTokenizerFast":
    """The tokenizer: ids 0, 1, 2 are <bos>, <eos>, <unk>; adds no special token by itself."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = [BOS, EOS, UNK, *(f" {word}" for word in words())]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+\S+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
