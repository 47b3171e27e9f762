"""A small English vocabulary for models with random weights: real words, so that texts look like texts."""

from __future__ import annotations

import string

COMMON_WORDS = """
the a an of and or in on at to with for from by is are was be as it its this that these those there here not no yes
one two three four five six seven eight nine ten many few some all each other another same own up down left right over
under near far front back behind between through around inside outside top bottom side red orange yellow green blue
purple pink brown black white gray gold silver dark light bright small large big little tall short long wide narrow
round square flat old new young hot cold warm wet dry open closed full empty happy sad angry smiling crying laughing
man woman boy girl child baby person people family friend face head hair eye eyes nose mouth ear hand hands arm leg
foot body heart dog cat horse cow sheep pig bird duck chicken fish whale shark bear lion tiger elephant monkey mouse
rabbit fox wolf frog snake turtle spider bee butterfly ant snail tree trees leaf flower rose grass plant forest garden
mountain hill river lake sea ocean beach island sand rock stone sky sun moon star stars cloud rain snow ice fire water
wind storm rainbow earth world day night morning evening summer winter spring house home building church tower castle
bridge road street city town park field farm room door window wall roof floor table chair bed desk lamp book paper pen
pencil letter card box bag bottle cup glass plate bowl knife fork spoon pot pan bread cake cookie pie cheese egg meat
rice soup salad pizza apple banana grape lemon melon peach pear cherry strawberry tomato potato carrot corn pepper tea
coffee milk juice wine beer sugar salt car truck bus train plane boat ship bicycle motorcycle wheel sign map clock
watch phone camera computer screen keyboard television radio music guitar piano drum violin song dance ball game
football baseball basketball tennis swim run running walk walking sit sitting stand standing lie lying jump jumping
ride riding drive driving fly flying eat eating drink drinking play playing sleep sleeping look looking hold holding
wear wearing carry read reading write make take give show hat cap shirt dress coat shoe shoes boot glove scarf tie
ring crown flag key lock hammer tool rope chain mirror candle gift balloon bell medal money coin diamond gun sword
shield bow arrow rocket robot ghost angel devil alien king queen prince doctor police soldier worker farmer cook
teacher student artist singer player group crowd line pair couple part piece color picture photo image drawing symbol
mark number circle triangle cross
""".split()  # noqa: SIM905 - four hundred quoted words would hide them

SUFFIX_PIECES = ("s", "es", "ed", "ing", "er", "est", "ly", "y", "ness", "ment", "tion", "al", "ful", "less", "able")
PUNCTUATION = string.punctuation + "–—’“”…"


def word_pieces() -> list[str]:
    """A WordPiece vocabulary: BERT's special tokens, single characters, suffixes, words. Always the same order."""
    characters = [*string.digits, *string.ascii_lowercase]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PUNCTUATION, *characters]
    vocabulary += [f"##{character}" for character in characters]
    vocabulary += [f"##{piece}" for piece in SUFFIX_PIECES]
    vocabulary += COMMON_WORDS
    return list(dict.fromkeys(vocabulary))
