"""The table of commands that `reports.cli` mounts: the module of each, imported when it is used, and its help line."""

# command: its module, which defines <command>_command, and one line of help
COMMANDS = {
    "run": ("audit.commands.run", "Run a benchmark file, or resume it."),
    "audit": ("audit.commands.audit", "Audit one model."),
    "attack": ("audit.commands.attack", "Attack a model, and check the attack."),
    "certify": ("audit.commands.certify", "Bound the accuracy of every head on a layer."),
    "verify": ("audit.commands.verify", "Verify a run folder, or the witnesses of a certificate."),
    "validate": ("audit.commands.inspect.validate", "Find every fault of a benchmark file."),
    "plan": ("audit.commands.inspect.plan", "Forecast the cost of a benchmark."),
    "status": ("audit.commands.inspect.status", "Count done, failed and unfinished cells."),
    "compare": ("audit.commands.inspect.compare", "Pair the cells of two runs."),
    "export": ("audit.commands.inspect.export", "Write a run as csv, parquet, safetensors, claims, or a card."),
    "convert": ("audit.commands.convert", "Write a checkpoint as safetensors, safely."),
    "doctor": ("audit.commands.inspect.doctor", "Check the installation and the machine."),
    "calibrate": ("audit.commands.calibrate", "Compare estimators with known channels."),
    "features": ("audit.commands.features", "Rank the features of a layer by vulnerability."),
    "saliency": ("audit.commands.saliency", "Map the information of a layer onto pixels."),
    "reproduce": ("audit.commands.reproduce.group", "Compute a table or figure of the paper."),
    "models": ("audit.commands.models", "List the models that can be named."),
    "layers": ("audit.commands.layers", "List the layers of a model."),
    "train": ("audit.commands.train", "Train a model from its recipe."),
}
