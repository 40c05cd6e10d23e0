// What the kernels of prime_advantage's credit forms take, on the CPU and on a GPU.
#pragma once
#include <array>
#include <cstdint>
#include <type_traits>

#include "advantage_params.h"

namespace prime {

enum Credit { CRITIC, PAV, LOOKAHEAD, ODDS, TD };

// A launch runs some of them one after the other. INDEX and DEVIATIONS are of ODDS alone.
//   ROWS        rewards, scores, and of each step its process term, or the sum of q of ODDS
//   INDEX       of all rows' steps of an index, the sum
//   DEVIATIONS  the steps' distances from the mean of their index
//   SUMS        of each row's advantages and of their squares, where they are whitened
//   WRITE       the advantages
// What is found between two stages (moments) is read where a launch begins after the first of them.
enum Stage { ROWS, INDEX, DEVIATIONS, SUMS, WRITE };

// Of Params: peaks (rows,): of ODDS the largest |sum of q| of a step; totals
// (rows, 4): sum, squares, squared deviations, steps; coefficients (rows,): the outcome's term; moments (4,): mean,
// 1 / deviation, 1 / spread of ODDS, the largest of peaks: infinite for a bad batch, of which nothing is used.
struct CreditParams : Params {
    const int* step;          // (tokens,) or null: every token is a step
    double *prefix, *term;    // (tokens,) from each row's start on, by step: sum of q or value so far; process term
    long long* index;         // (3, tokens) by step: high and low of the sum, as Exact; rows that have it
    int first, last, credit;  // Stage, Stage, Credit
    double slope, drift, shrink, prior;
};

// pointers: prm, ref, outcome, offsets, group, step, advantage, reward, score, prefix, term, index, peaks, coefficients,
// totals, moments. numbers: beta, gamma, outcome_gamma, process_weight, outcome_weight, slope, drift, shrink,
// prior.
using CreditPointers = std::array<uintptr_t, 16>;
using CreditNumbers = std::array<double, 9>;

inline CreditParams credit_params(const CreditPointers& pointers, long long tokens, int rows, int first, int last,
                                  int credit, bool process, bool whiten, const CreditNumbers& numbers) {
    int at = 0;
    const auto next = [&](auto*& to) { to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(pointers[at++]); };
    CreditParams p{};
    next(p.prm), next(p.ref), next(p.outcome), next(p.offsets), next(p.group), next(p.step);
    next(p.advantage), next(p.reward), next(p.score), next(p.prefix), next(p.term), next(p.index);
    next(p.peaks), next(p.coefficients), next(p.totals), next(p.moments);
    p.tokens = tokens, p.rows = rows, p.first = first, p.last = last, p.credit = credit;
    p.process = process, p.whiten = whiten;
    p.beta = numbers[0], p.gamma = numbers[1], p.outcome_gamma = numbers[2];
    p.process_weight = numbers[3], p.outcome_weight = numbers[4];
    p.slope = numbers[5], p.drift = numbers[6], p.shrink = numbers[7], p.prior = numbers[8];
    return p;
}

// Returns the CUDA error as text, empty when there is none.
const char* launch_credit(CreditParams& params, bool bfloat16, void* stream);

}  // namespace prime
