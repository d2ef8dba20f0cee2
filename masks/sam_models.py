"""Segment Anything from its published checkpoints."""

import re
from pathlib import Path

from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from localized_crops.files import UserError
from utils import file_sha256, load_tensors, torch_seed

ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything"
# Meta's files (Apache 2.0; 2.6, 1.2 and 0.4 GB) and their sha256
CHECKPOINTS = {
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
}


def load_sam(model: str, checkpoint: str | None) -> tuple[Sam, str]:
    """Build a Segment Anything model and load its weights.

    Args:
        model: vit_b | vit_l | vit_h.
        checkpoint: the file; "random" (to test a pipeline: such a network segments nothing).

    Returns:
        The model in eval mode; and the sha256 of the file, or "random".

    Raises:
        UserError: one line, if there is no checkpoint, it is torn, or of another size.
    """
    name, _ = CHECKPOINTS[model]
    if checkpoint is None:
        raise UserError(f"sam.checkpoint: none given; fetch {ADDRESS}/{name} and give sam.checkpoint=FILE")
    if checkpoint == "random":
        with torch_seed(0):
            return sam_model_registry[model]().eval(), "random"
    state = load_tensors(checkpoint)
    sha256 = file_sha256(checkpoint)
    expected = dict(CHECKPOINTS.values()).get(Path(checkpoint).name, sha256)
    if sha256 != expected:
        raise UserError(
            f"{checkpoint}: damaged, its sha256 is {sha256[:12]}..., not {expected[:12]}...; fetch it again"
        )
    sam = sam_model_registry[model]()
    try:
        sam.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        width = re.search(r"pos_embed.*?torch\.Size\(\[1, \d+, \d+, (\d+)\]\)", str(error))
        is_of = {"768": "vit_b", "1024": "vit_l", "1280": "vit_h"}.get(width[1] if width else "", "another network")
        raise UserError(f"{checkpoint}: of {is_of}, not of sam.model={model}; give the model that it is of") from None
    return sam.eval(), sha256
