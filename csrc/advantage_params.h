// What the CUDA kernels of prime_advantage take.
#pragma once

namespace prime {

constexpr int kThreads = 256, kItems = 4, kWarps = kThreads / 32, kWarpTile = 32 * kItems, kTile = kThreads * kItems;
constexpr int kMembers = 64;  // rows of a group kept in a list; a larger group is searched anew each time

enum Field { PEAK, TOTAL, S, SS, SG, SO, G, GG, GO, O, OO, FIELDS };
enum Estimator { RLOO_RUN, RLOO_PAPER, GRPO, REINFORCE };
enum Phase { EVERYTHING, ONLY_SUMS, ONLY_WRITE };

struct Powers {  // of one discount
    double item[kItems + 1];  // x^k
    double scan[5];           // x^(kItems 2^k)
    double warp, tile, ones;  // x^kWarpTile, x^kTile, 1 + .. + x^(kTile-1)
};

struct Params {
    const void *prm, *ref;            // (tokens,) float or bfloat16; null: no rewards
    const float* outcome;             // (rows,)
    const int* offsets;               // (rows + 1,)
    const long long* group;           // (rows,)
    float *advantage, *reward;        // (tokens,)
    float* score;                     // (rows,)
    double* sums;                     // (FIELDS, rows)
    double* coefficients;             // (3, rows)
    double* moments;                  // (2,) mean, 1 / deviation
    double* peaks;                    // (blocks,)
    double* totals;                   // (groups, 2)
    int* status;                      // [0] 1 when an argument holds a bad value, [1] groups counted
    long long tokens;
    int rows, phase, estimator;
    bool process, normalize, whiten;
    double beta, gamma, outcome_gamma, process_weight, outcome_weight;
    Powers discount, outcome_discount;
};

// Returns the CUDA error as text, empty when there is none.
const char* launch(Params& params, bool bfloat16, void* stream);

}  // namespace prime
