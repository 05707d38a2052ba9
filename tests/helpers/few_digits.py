"""A handful of the built-in digits as a data set of one's own, some of them without an object."""

import json
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog


def few_digits(folder: Path, images: int, empty: tuple[int, ...] = (), split: str = "digits_val") -> list[str]:
    """An entry of DATASETS.REGISTER: the first `images` of `split`; those at the indices `empty` have no object."""
    DatasetCatalog.get(split)  # writes it, the first time
    metadata = MetadataCatalog.get(split)
    content = json.loads(Path(metadata.json_file).read_text())
    content["images"] = content["images"][:images]
    kept = {image["id"] for i, image in enumerate(content["images"]) if i not in empty}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    path = folder / f"few_{images}_{'_'.join(map(str, empty))}.json"
    path.write_text(json.dumps(content))
    return [f"{folder.name}_{path.stem}", str(path), str(Path(metadata.image_root).absolute())]
