"""One linear program, its variables between 0 and 1 and some of them whole, given to HiGHS.

HiGHS is called directly because a known plan shall start its search, and because the duals of the relaxation are wanted. It runs on
one thread with one seed and is stopped by nodes and never by the clock, so equal programs have equal answers. It stops at a relative
gap of 1e-4 unless told otherwise; here both gaps are 0 but where one is asked for. Left out: unbounded and free variables.
"""

from dataclasses import dataclass

import highspy
import numpy as np
import scipy.sparse


@dataclass(frozen=True)
class Program:
    """Minimise `costs` @ x with `lower` <= `matrix` @ x <= `upper` and 0 <= x <= 1; the first `whole` variables are 0 or 1."""

    costs: np.ndarray
    matrix: scipy.sparse.csr_array
    lower: np.ndarray
    upper: np.ndarray
    whole: int


@dataclass(frozen=True)
class Relaxed:
    """The best x where none need be whole, its cost, and by how much that falls for a unit more of each row's upper limit."""

    values: np.ndarray
    objective: float
    prices: np.ndarray


@dataclass(frozen=True)
class Found:
    """The best whole x that was found (None: none was), its cost, a proven lower bound on all, and whether the search was exhausted."""

    values: np.ndarray | None
    objective: float
    bound: float
    exhausted: bool


def relax(program: Program) -> Relaxed | None:
    """Solves the program with no variable whole; None where even that is impossible."""
    solver = _solver(program, relaxed=True)
    solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"HiGHS ended with {status.name} on the relaxation of an allocation problem")
    solution = solver.getSolution()
    return Relaxed(np.array(solution.col_value), solver.getInfo().objective_function_value, np.maximum(0.0, -np.array(solution.row_dual)))


def search(program: Program, start: np.ndarray | None, gap: float, nodes: int | None) -> Found:
    """Solves the program by branch and cut.

    Args:
        program: what to solve.
        start: an x to start from, whole where it must be; only the whole variables, in order.
        gap: stop where (objective - bound) / objective is no more than this.
        nodes: stop after about so many nodes of the search tree; None: never.
    """
    solver = _solver(program)
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("mip_abs_gap", 0.0)
    if nodes is not None:
        solver.setOptionValue("mip_max_nodes", nodes)
    if start is not None:
        solver.setSolution(len(start), np.arange(len(start), dtype=np.int32), start.astype(np.float64))
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return Found(None, np.inf, np.inf, True)
    stopped = status == highspy.HighsModelStatus.kSolutionLimit
    if status != highspy.HighsModelStatus.kOptimal and not stopped:
        raise RuntimeError(f"HiGHS ended with {status.name} on an allocation problem")
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Found(None, np.inf, info.mip_dual_bound, False)
    return Found(np.array(solver.getSolution().col_value), info.objective_function_value, info.mip_dual_bound, not stopped)


def _solver(program: Program, relaxed: bool = False) -> highspy.Highs:
    model = highspy.HighsModel()
    form, columns, count = model.lp_, scipy.sparse.csc_array(program.matrix), len(program.costs)
    form.num_row_, form.num_col_ = len(program.lower), count
    form.col_cost_ = program.costs
    form.col_lower_, form.col_upper_ = np.zeros(count), np.ones(count)
    form.row_lower_, form.row_upper_ = program.lower, program.upper
    form.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    form.a_matrix_.start_, form.a_matrix_.index_ = columns.indptr.astype(np.int32), columns.indices.astype(np.int32)
    form.a_matrix_.value_ = columns.data.astype(np.float64)
    if not relaxed:
        form.integrality_ = [highspy.HighsVarType.kInteger] * program.whole + [highspy.HighsVarType.kContinuous] * (count - program.whole)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    # `parallel` and not `threads`: HiGHS fails when a later solve in the process asks for another number of threads.
    solver.setOptionValue("parallel", "off")
    solver.setOptionValue("random_seed", 0)
    solver.passModel(model)
    return solver
