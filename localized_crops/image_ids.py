"""Image ids, integers (CUB) or text (a path below the data set's folder), as the text keys of JSON and safetensors."""

ImageId = int | str
MOST_DIGITS = 18  # of an integer id: it fits int64


def id_to_key(image_id: ImageId) -> str:
    """Return an id as a file's key.

    Raises:
        ValueError: if it would not come back as it is: an empty or negative id, or digits as text.
    """
    key = str(image_id)
    if not key or key_to_id(key) != image_id:
        raise ValueError(f"image id {image_id!r} must be a whole number under 10^{MOST_DIGITS} or text that is none")
    return key


def key_to_id(key: str) -> ImageId:
    """Return the id of a file's key: an integer for digits without leading zeros, the text itself otherwise."""
    is_number = key.isascii() and key.isdigit() and len(key) <= MOST_DIGITS and (key[0] != "0" or key == "0")
    return int(key) if is_number else key
