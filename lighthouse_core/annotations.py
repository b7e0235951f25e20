"""What a training step spends its time on: names of its costs, which annotations in a trace carry."""

PYRAMID = "attention: pyramid + score"
SELECT = "attention: select"
GATHER = "attention: gather"
DENSE_CALL = "attention: dense call"
SCATTER = "attention: scatter"
MERGE = "attention: merge"
DENSE_LAYERS = "dense layers' attention"
PROJECTIONS = "projections"
MLP = "MLP"
EMBEDDING = "embedding"
HEAD = "head + loss"
REST = "norms, RoPE, residuals"
OPTIMIZER = "optimizer"
COMMUNICATION = "communication"
DATA = "data"
OTHER = "other"
IDLE = "idle"
CATEGORIES = (
    *(PYRAMID, SELECT, GATHER, DENSE_CALL, SCATTER, MERGE, DENSE_LAYERS, PROJECTIONS, MLP, EMBEDDING, HEAD, REST),
    *(OPTIMIZER, COMMUNICATION, DATA, OTHER, IDLE),
)
# An annotation around what is REST unless something within says more.
MODEL = "model"
