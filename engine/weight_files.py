"""Names under which folders hold weights; no torch here, so that programs can tell at once what a folder is."""

# of a whole model, in order of preference: ours, then the published layouts
MODEL_FILES = (
    "model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# in every checkpoint of DeepSpeed's stages 0 to 2, also where only a part of the model is trained and held
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
FOLDER_FILES = (*MODEL_FILES, DEEPSPEED_FILE)
