"""Whether a compact model is as small and as good as was wanted, in words, and what to do if it is not."""

from collections.abc import Sequence
from fractions import Fraction

from common.config.distillation import DistillationSection
from common.config.manifest import LOWER_IS_BETTER
from server.distillation.measuring import Measured

__all__ = ["judge"]


def judge(
    lines: Sequence[Measured], settings: DistillationSection, metric: str, *, ratio: Fraction
) -> tuple[str, bool]:
    """The verdict on the last network among `lines`, held against the first, the teacher; and whether both targets
    are met. `ratio` is the size that was tried for. What is lost is told by `metric` on dev records, without any by
    the texts on which both disagree."""
    networks = [line for line in lines if line.parameters is not None]
    teacher, final = networks[0], networks[-1]
    before, after = teacher.parameters or 1, final.parameters or 1
    if teacher.dev:
        change = final.dev[metric] - teacher.dev[metric]
        lost = change if metric in LOWER_IS_BETTER else -change
        told = f"{metric} {teacher.dev[metric]:.3f} to {final.dev[metric]:.3f} on dev records"
    else:
        agreed = final.agreement or 0.0
        lost, told = 1 - agreed, f"the teacher's answer on {agreed:.1%} of held-out public text"
    words = [f"{after:,} parameters, {after / before:.3f} of the teacher's; {told}."]
    small, good = after <= ratio * before, lost <= settings.max_loss
    if not small:
        words.append(f"The size {ratio} was not reached: take the step 'student' too.")
    if not good:
        words.append(
            f"It loses {lost:.3f} where distillation.max_loss allows {settings.max_loss:g}: give more public text, more"
            " distillation.epochs or a larger distillation.size."
        )
    return " ".join(words), small and good
