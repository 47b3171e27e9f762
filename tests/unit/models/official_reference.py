"""The authors' forward pass put together from transformers' parts, with tiny random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH, VISION_WIDTH, PATCH, GRID = 48, 32, 8, 4
MLP_DIM = 56
NUM_LATENTS = 5
IMAGE_TOKEN = "<image>"
WORDS = (
    "a the red green blue apple pear dog cat man woman child is on under table street snow two three old tiny "
    "##s ##ing run jump sit hold ball boat tree house ! ? , . - e i o u x y z ##a ##b ##e ##o ##x"
)
PIECES = tuple(WORDS.split(" "))


class LatentAdapter(nn.Module):
    """M latents, separate key and value maps, multi-head attention, no residual around it, then an MLP block."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, NUM_LATENTS, VISION_WIDTH))
        self.key = nn.Linear(VISION_WIDTH, VISION_WIDTH)
        self.value = nn.Linear(VISION_WIDTH, VISION_WIDTH)
        self.attention = nn.MultiheadAttention(VISION_WIDTH, 4, batch_first=True)
        self.layernorm = nn.LayerNorm(VISION_WIDTH, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(VISION_WIDTH, MLP_DIM), "fc2": nn.Linear(MLP_DIM, VISION_WIDTH)})
        self.projection = nn.Linear(VISION_WIDTH, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        latents = self.attention(query, self.key(tokens), self.value(tokens))[0]
        hidden = nn.functional.gelu(self.mlp["fc1"](self.layernorm(latents)))
        return self.projection(latents + self.mlp["fc2"](hidden))


class Reference(nn.Module):
    """Parts under the names of the authors' checkpoint."""

    def __init__(self, tokenizer: Any, *, compressed: bool) -> None:
        import transformers
        from transformers.models.bert.modeling_bert import BertPooler

        super().__init__()
        vision = {
            "hidden_size": VISION_WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": PATCH * GRID, "patch_size": PATCH,
        }  # fmt: skip
        text = {
            "hidden_size": VISION_WIDTH, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
            "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 1,
        }  # fmt: skip
        bert = transformers.BertConfig(
            vocab_size=len(tokenizer) - 1, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=72, max_position_embeddings=512,
        )  # fmt: skip
        self.tokenizer = tokenizer
        self.num_tokens = NUM_LATENTS if compressed else GRID * GRID
        self.vision_encoder = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
        self.language_model = transformers.BertForMaskedLM(bert)
        self.language_model.resize_token_embeddings(len(tokenizer))
        self.vision_projection = (
            LatentAdapter()
            if compressed
            else nn.Sequential(nn.Linear(VISION_WIDTH, MLP_DIM), nn.GELU(), nn.Linear(MLP_DIM, WIDTH))
        )
        self.clip = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
        self.classification_head = nn.Sequential(BertPooler(bert), nn.Linear(WIDTH, 1))
        self.text_projection = nn.Linear(WIDTH, VISION_WIDTH)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in self.parameters():
                base = 1.0 if parameter.ndim == 1 and float(parameter.float().mean()) > 0.5 else 0.0
                parameter.copy_(base + 0.12 * torch.randn(parameter.shape, generator=generator))
            self.clip.vision_model.load_state_dict(self.vision_encoder.state_dict())
        self.eval()

    @torch.inference_mode()
    def logits(self, pixel_values: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """One padded batch: pair tokenization with the image placeholders, then the image tokens in their places."""
        tokens = self.vision_projection(self.vision_encoder(pixel_values=pixel_values).last_hidden_state)
        placeholder = IMAGE_TOKEN * self.num_tokens
        inputs = self.tokenizer(
            texts, [placeholder] * len(texts), padding=True, truncation="only_first",
            max_length=64 + self.num_tokens, return_tensors="pt",
        )  # fmt: skip
        ids = inputs.pop("input_ids")
        embeddings = self.language_model.get_input_embeddings()(ids)
        places = (ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).unsqueeze(-1).expand_as(embeddings)
        embeddings = embeddings.masked_scatter(places, tokens)
        hidden = self.language_model(inputs_embeds=embeddings, output_hidden_states=True, **inputs).hidden_states[-1]
        return self.classification_head(hidden).view(-1)


def write_vocab(path: Path) -> Path:
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]) + "\n")
    return path


def reference_tokenizer(vocab: Path) -> Any:
    import transformers

    tokenizer = transformers.BertTokenizer(str(vocab), do_lower_case=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def varied_texts(count: int) -> list[str]:
    """Short, empty, unknown, punctuated and much too long ones."""
    generator = torch.Generator().manual_seed(3)
    words = [piece for piece in PIECES if not piece.startswith("##")]
    lengths = torch.randint(0, 14, (count,), generator=generator).tolist()
    texts = [
        " ".join(words[i] for i in torch.randint(0, len(words), (length,), generator=generator).tolist())
        for length in lengths
    ]
    texts[:4] = ["", "Ünknown 漢字 \u200b x", "a red apple, two dogs!", "the old man " * 60]
    return texts
