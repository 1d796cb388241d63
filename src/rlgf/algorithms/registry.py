"""The algorithms by name."""

from rlgf.algorithms.base import AlgorithmOptions
from rlgf.algorithms.grouped import GRPO, RLOO, GuidedGRPO
from rlgf.algorithms.guided import D2LOLS, LOLS, PPO, AggreVaTeD, PPOPlusPlus

# public names, as in a config
ppo, ppo_pp, aggrevated, lols, d2lols = PPO, PPOPlusPlus, AggreVaTeD, LOLS, D2LOLS
grpo, rloo, guided_grpo = GRPO, RLOO, GuidedGRPO

ALGORITHMS: dict[str, type[AlgorithmOptions]] = {
    kind.name: kind for kind in (PPO, PPOPlusPlus, AggreVaTeD, LOLS, D2LOLS, GRPO, RLOO, GuidedGRPO)
}
"""The classes of options by the name of their algorithm."""
