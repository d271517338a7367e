"""Files that ship with the package; `NOTICE.md` has their sources and licences.

SAMPLE_SCAN is the MNI152 2009a average brain on the published contract's grid, SAMPLE_MASK its brain mask, TEMPLATE the
registration's target (2009c), COARSE_BRAIN and COARSE_GREY_MATTER the template's T1w brain and grey matter at 4 mm.
QUALITY holds the coefficients of the score that judges prepared scans, and what they were fitted on.
"""

from pathlib import Path

ASSETS = Path(__file__).parent
SAMPLE_SCAN = ASSETS / "sample_T1w_brain.nii.gz"
SAMPLE_MASK = ASSETS / "sample_brain_mask.nii.gz"
TEMPLATE = ASSETS / "mni152_2009c_sym_T1w_brain.nii.gz"
COARSE_BRAIN = ASSETS / "mni152_brain_4mm.nii.gz"
COARSE_GREY_MATTER = ASSETS / "mni152_grey_matter_4mm.nii.gz"
GOLDEN_EMBEDDINGS = ASSETS / "golden.json"
QUALITY = ASSETS / "quality.json"
