"""Models as folders and repositories: convert a checkpoint, fetch ahead, publish on the Hugging Face Hub, verify.

A model's folder holds `model.safetensors` (with its provenance), `config.json` (a card of one model, see
`brainfm.zoo.cards`, and the golden embedding) and `README.md` (the model card). `local-dir:` reads it, `push_to_hub`
uploads it, and `hf-hub:` reads it from there.
"""

from brainfm.hub.folder import convert, fetch, save_for_hub
from brainfm.hub.golden import Check, verify
from brainfm.hub.organisation import Published, publish_all
from brainfm.hub.publish import push_to_hub

__all__ = ["Check", "Published", "convert", "fetch", "publish_all", "push_to_hub", "save_for_hub", "verify"]
