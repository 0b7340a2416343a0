/* Small dense products at the full width of the processor's vectors, and SGD on fully connected networks.
 *
 * Matrices are rows of floats, the last index running fastest: inputs x [n, in], weights w [out, in], outputs
 * y [n, out], gradients d [n, out]. A product is cut into tiles whose sums stay in registers. Plain vector types
 * of GCC and Clang, so that one source serves every processor; results do not depend on the number of threads.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16     /* floats in a vector */
#define ROWS 5       /* rows of x in a tile */
#define COLUMNS 4    /* rows of w, or vectors of columns, in a tile */
#define BLOCK 40     /* rows of x that pass w together: they stay in the second cache */
#define INLINE static inline __attribute__((always_inline))
#define EACH _Pragma("GCC unroll 8") for

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(LANES)));

typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int16_t shorts __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int16_t few_shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

enum { LINEAR, RELU, SIGMOID, TANH };

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec all(float a) { return a - (vec){0}; }
INLINE shorts all_short(int16_t a) { return a - (shorts){0}; }

INLINE vec choose(ints mask, vec yes, vec no) { return (vec)((mask & (ints)yes) | (~mask & (ints)no)); }

/* The first n < LANES floats, zeros after them. */
INLINE vec load_part(const float *p, long n)
{
    if (n == LANES / 2) {
        half h = *(const half *)p;
        return __builtin_shufflevector(h, (half){0}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
    float filled[LANES] = {0};
    memcpy(filled, p, n * sizeof(float));
    return load(filled);
}

INLINE float sum(vec v)
{
    half a, b;
    quarter c, d;
    memcpy(&a, &v, sizeof a);
    memcpy(&b, (char *)&v + sizeof a, sizeof b);
    a += b;
    memcpy(&c, &a, sizeof c);
    memcpy(&d, (char *)&a + sizeof c, sizeof d);
    c += d;
    return (c[0] + c[1]) + (c[2] + c[3]);
}

INLINE long smaller(long a, long b) { return a < b ? a : b; }

INLINE float activate(float v, int kind)
{
    switch (kind) {
    case RELU: return v < 0 ? 0 : v;
    case SIGMOID: return 1 / (1 + expf(-v));
    case TANH: return tanhf(v);
    default: return v;
    }
}

/* y = σ(x wᵀ + b) of R rows of x and C rows of w. */
INLINE void forward_tile(const int R, const int C, const float *x, const float *w, const float *b, long in,
                         float *y, long out, int kind)
{
    vec s[ROWS][COLUMNS] = {0};
    long i = 0;
    for (; i + LANES <= in; i += LANES) {
        vec u[COLUMNS];
        EACH (int c = 0; c < C; c++) u[c] = load(w + c * in + i);
        EACH (int r = 0; r < R; r++) {
            vec v = load(x + r * in + i);
            EACH (int c = 0; c < C; c++) s[r][c] += v * u[c];
        }
    }
    if (i < in) {
        vec u[COLUMNS];
        EACH (int c = 0; c < C; c++) u[c] = load_part(w + c * in + i, in - i);
        EACH (int r = 0; r < R; r++) {
            vec v = load_part(x + r * in + i, in - i);
            EACH (int c = 0; c < C; c++) s[r][c] += v * u[c];
        }
    }
    EACH (int r = 0; r < R; r++)
        EACH (int c = 0; c < C; c++)
            y[r * out + c] = activate(sum(s[r][c]) + (b ? b[c] : 0), kind);
}

/* Calls TILE(R, C, ...) with constant R and C for `rows` rows left: full tiles have R = ROWS. */
#define BY_ROWS(TILE, rows, C, ...)                   \
    switch (rows) {                                   \
    case 1: TILE(1, C, __VA_ARGS__); break;           \
    case 2: TILE(2, C, __VA_ARGS__); break;           \
    case 3: TILE(3, C, __VA_ARGS__); break;           \
    case 4: TILE(4, C, __VA_ARGS__); break;           \
    default: TILE(ROWS, C, __VA_ARGS__);              \
    }

/* y [n, out] = σ(x [n, in] wᵀ + b); b may be null. */
void fl_forward(const float *x, const float *w, const float *b, long n, long in, long out, int kind, float *y)
{
    for (long top = 0; top < n; top += BLOCK)
        for (long o = 0; o < out;) {
            long wide = o + COLUMNS <= out ? COLUMNS : 1, end = smaller(top + BLOCK, n);
            for (long r = top; r < end; r += ROWS) {
                const float *xr = x + r * in, *wo = w + o * in, *bo = b ? b + o : 0;
                float *yr = y + r * out + o;
                if (wide == COLUMNS)
                    BY_ROWS(forward_tile, end - r, COLUMNS, xr, wo, bo, in, yr, out, kind)
                else
                    BY_ROWS(forward_tile, end - r, 1, xr, wo, bo, in, yr, out, kind)
            }
            o += wide;
        }
}

/* s += Σ_k d_k x_k of R scalars and C vectors, over `count` rows of x that lie `in` floats apart; the scalars of a
 * k lie `across` apart, those of the next k `along` further. The last vector may hold `part` < LANES floats. */
INLINE void outer_products(const int R, const int C, vec s[ROWS][COLUMNS], const float *d, long across, long along,
                           const float *x, long count, long in, long part)
{
    for (long k = 0; k < count; k++) {
        vec u[COLUMNS];
        EACH (int c = 0; c < C; c++)
            u[c] = part ? load_part(x + k * in, part) : load(x + k * in + c * LANES);
        EACH (int r = 0; r < R; r++) {
            vec v = all(d[r * across + k * along]);
            EACH (int c = 0; c < C; c++) s[r][c] += v * u[c];
        }
    }
}

/* g = d w of R rows of d and C vectors of columns of w; the last vector may hold `part` < LANES floats. */
INLINE void below_tile(const int R, const int C, const float *d, const float *w, long out, long in, float *g,
                       long part)
{
    vec s[ROWS][COLUMNS] = {0};
    outer_products(R, C, s, d, out, 1, w, out, in, part);
    EACH (int r = 0; r < R; r++)
        EACH (int c = 0; c < C; c++)
            if (part)
                memcpy(g + r * in, &s[r][c], part * sizeof(float));
            else
                store(g + r * in + c * LANES, s[r][c]);
}

/* g [n, in] = d [n, out] w */
void fl_below(const float *d, const float *w, long n, long in, long out, float *g)
{
    for (long top = 0; top < n; top += BLOCK)
        for (long i = 0; i < in;) {
            long left = in - i, end = smaller(top + BLOCK, n);
            long wide = left >= COLUMNS * LANES ? COLUMNS * LANES : smaller(left, LANES);
            for (long r = top; r < end; r += ROWS) {
                const float *dr = d + r * out, *wi = w + i;
                float *gr = g + r * in + i;
                if (wide == COLUMNS * LANES)
                    BY_ROWS(below_tile, end - r, COLUMNS, dr, wi, out, in, gr, 0)
                else
                    BY_ROWS(below_tile, end - r, 1, dr, wi, out, in, gr, wide == LANES ? 0 : wide)
            }
            i += wide;
        }
}

/* w ← β w + α dᵀ x of R rows of w and C vectors of its columns, over n rows of d and x. */
INLINE void step_tile(const int R, const int C, const float *d, const float *x, long n, long in, long out,
                      float *w, float beta, float alpha, long part)
{
    vec s[ROWS][COLUMNS] = {0};
    outer_products(R, C, s, d, 1, out, x, n, in, part);
    EACH (int r = 0; r < R; r++)
        EACH (int c = 0; c < C; c++) {
            float *p = w + r * in + c * LANES;
            vec old = part ? load_part(p, part) : load(p), now = all(beta) * old + all(alpha) * s[r][c];
            if (part)
                memcpy(p, &now, part * sizeof(float));
            else
                store(p, now);
        }
}

/* w [out, in] ← β w + α dᵀ x */
void fl_step(const float *d, const float *x, long n, long in, long out, float *w, float beta, float alpha)
{
    for (long top = 0; top < n; top += BLOCK, beta = 1)
        for (long o = 0; o < out; o += ROWS)
            for (long i = 0; i < in;) {
                long left = in - i, rows = smaller(BLOCK, n - top);
                long wide = left >= COLUMNS * LANES ? COLUMNS * LANES : smaller(left, LANES);
                const float *dt = d + top * out + o, *xt = x + top * in + i;
                float *wt = w + o * in + i;
                if (wide == COLUMNS * LANES)
                    BY_ROWS(step_tile, out - o, COLUMNS, dt, xt, rows, in, out, wt, beta, alpha, 0)
                else
                    BY_ROWS(step_tile, out - o, 1, dt, xt, rows, in, out, wt, beta, alpha,
                            wide == LANES ? 0 : wide)
                i += wide;
            }
}

/* b [out] ← β b + α Σ d */
void fl_step_bias(const float *d, long n, long out, float *b, float beta, float alpha)
{
    for (long o = 0; o < out; o++)
        b[o] *= beta;
    for (long k = 0; k < n; k++)
        for (long o = 0; o < out; o++)
            b[o] += alpha * d[k * out + o];
}

/* d ← the gradient before an activation, from that after it and the activation's output h. */
static void before_activation(float *d, const float *h, long count, int kind)
{
    if (kind == RELU)
        for (long i = 0; i < count; i++)
            d[i] = h[i] > 0 ? d[i] : 0;
    else if (kind == SIGMOID)
        for (long i = 0; i < count; i++)
            d[i] *= (1 - h[i]) * h[i];
    else if (kind == TANH)
        for (long i = 0; i < count; i++)
            d[i] *= 1 - h[i] * h[i];
}

/* d = (softmax(z) − onehot(y)) / n, the gradient of the mean cross-entropy by the logits z [n, classes]; row k has
 * the label y[order[k]]. */
static void cross_entropy(const float *z, const int64_t *y, const int64_t *order, long n, long classes, float *d)
{
    for (long k = 0; k < n; k++, z += classes, d += classes) {
        float most = z[0], total = 0;
        for (long c = 1; c < classes; c++)
            most = z[c] > most ? z[c] : most;
        for (long c = 0; c < classes; c++)
            total += d[c] = expf(z[c] - most);
        for (long c = 0; c < classes; c++)
            d[c] = (d[c] / total - (c == y[order[k]])) / n;
    }
}

/* v ← μ v + λ p, before a gradient is added to it. */
static void brake(float *v, const float *p, long count, float mu, float decay)
{
    for (long i = 0; i < count; i++)
        v[i] = mu * v[i] + decay * p[i];
}

static void follow(float *p, const float *v, long count, float lr)
{
    for (long i = 0; i < count; i++)
        p[i] -= lr * v[i];
}

/* One client's SGD: `epochs` passes over x [n, widths[0]], y [n] in the order given, in batches of `batch`.
 *
 * Layer l is w[l] [widths[l + 1], widths[l]], b[l] or null, activation kinds[l]; all step in place. With momentum
 * μ > 0 the velocities vw, vb have the shapes of w, b. scratch holds batch × (Σ widths + 2 max widths) floats, the
 * maximum without widths[0].
 */
void fl_train_dense(const float *x, const int64_t *y, const int64_t *order, long n, long batch, long epochs,
                    int layers, const long *widths, const int *kinds, float *const *w, float *const *b,
                    float *const *vw, float *const *vb, float lr, float mu, float decay, float *scratch)
{
    float *hidden[layers + 1], *d, *g, *swap;
    long widest = 0;
    for (int l = 0; l <= layers; l++) {
        hidden[l] = scratch;
        scratch += batch * widths[l];
        widest = l && widths[l] > widest ? widths[l] : widest;
    }
    d = scratch;
    g = scratch + batch * widest;
    for (long at = 0; at < epochs * n; at += smaller(batch, n - at % n)) {
        long first = at % n, rows = smaller(batch, n - first);
        for (long k = 0; k < rows; k++)
            memcpy(hidden[0] + k * widths[0], x + order[first + k] * widths[0], widths[0] * sizeof(float));
        for (int l = 0; l < layers; l++)
            fl_forward(hidden[l], w[l], b[l], rows, widths[l], widths[l + 1], kinds[l], hidden[l + 1]);
        cross_entropy(hidden[layers], y, order + first, rows, widths[layers], d);
        for (int l = layers - 1; l >= 0; l--) {
            long in = widths[l], out = widths[l + 1];
            if (l)
                fl_below(d, w[l], rows, in, out, g);
            if (mu > 0) {
                brake(vw[l], w[l], in * out, mu, decay);
                fl_step(d, hidden[l], rows, in, out, vw[l], 1, 1);
                follow(w[l], vw[l], in * out, lr);
            } else
                fl_step(d, hidden[l], rows, in, out, w[l], 1 - lr * decay, -lr);
            if (b[l] && mu > 0) {
                brake(vb[l], b[l], out, mu, decay);
                fl_step_bias(d, rows, out, vb[l], 1, 1);
                follow(b[l], vb[l], out, lr);
            } else if (b[l])
                fl_step_bias(d, rows, out, b[l], 1 - lr * decay, -lr);
            if (l) {
                before_activation(g, hidden[l], rows * in, kinds[l - 1]);
                swap = d, d = g, g = swap;
            }
        }
    }
}

/* e^x − 1, to a few units in the last place also where it is small: with x = k ln 2 + r, |r| ≤ ln 2 / 2, it is
 * 2^k (e^r − 1) + 2^k − 1. */
INLINE vec exp_minus_1(vec x)
{
    const vec most = all(87), shift = all(0x1.8p23f); /* numbers near the shift have no digits after the point */
    x = choose(x > most, most, choose(x < -most, -most, x));
    vec shifted = x * all(0x1.715476p0f) + shift, k = shifted - shift;
    vec r = x - k * all(0x1.62e4p-1f) - k * all(0x1.7f7d1cp-20f), p = all(1 / 5040.f);
    const float terms[] = {1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f};
    EACH (int i = 0; i < 5; i++) p = p * r + all(terms[i]);
    vec scale = (vec)(((ints)shifted + 127) << 23);
    return scale * (r + r * r * p) + (scale - all(1));
}

INLINE vec sigmoid(vec x) { return all(1) / (all(2) + exp_minus_1(-x)); }

INLINE vec hyperbolic_tangent(vec x)
{
    vec e = exp_minus_1(all(2) * x);
    return e / (e + all(2));
}

/* A step of an LSTM with peepholes for LANES units of one example: h, from the gates' inputs z in the order o, i, f,
 * g. gates [4, units] take the gates' values. */
INLINE vec lstm_unit(const vec z[4], const float *peephole, long units, const float *before, float *gates,
                     float *cell, float *squashed)
{
    vec po = load(peephole), pi = load(peephole + units), pf = load(peephole + 2 * units), c = load(before);
    vec i = sigmoid(z[1] + pi * c), f = sigmoid(z[2] + pf * c), g = hyperbolic_tangent(z[3]);
    c = f * c + i * g;
    vec o = sigmoid(z[0] + po * c), t = hyperbolic_tangent(c);
    store(gates, o), store(gates + units, i), store(gates + 2 * units, f), store(gates + 3 * units, g);
    store(cell, c), store(squashed, t);
    return o * t;
}

/* The same step backward: d, by z, from dh by h; dc, by the cell, goes one step back; `by` [7, units], by the four
 * biases and the three peepholes, adds up. */
INLINE void lstm_unit_back(vec dh, const float *peephole, long units, const float *before, const float *cell,
                           const float *gates, const float *squashed, float *dc, float *by, vec d[4])
{
    vec po = load(peephole), pi = load(peephole + units), pf = load(peephole + 2 * units), one = all(1);
    vec o = load(gates), i = load(gates + units), f = load(gates + 2 * units), g = load(gates + 3 * units);
    vec t = load(squashed), b = load(before);
    d[0] = dh * o * (one - o) * t;
    vec c = load(dc) + dh * o * (one - t * t) + d[0] * po;
    d[1] = c * i * (one - i) * g;
    d[2] = c * f * (one - f) * b;
    d[3] = c * i * (one - g * g);
    store(dc, c * f + d[1] * pi + d[2] * pf);
    const vec more[7] = {d[0], d[1], d[2], d[3], d[0] * load(cell), d[1] * b, d[2] * b};
    EACH (int k = 0; k < 7; k++) store(by + k * units, load(by + k * units) + more[k]);
}

/* LANES units of R examples; `u` [units, 4, LANES] is their recurrent weight, gates hold what the inputs give. */
INLINE void lstm_tile(const int R, const int C, const float *u, const float *bias, const float *peephole, long units,
                      const float *h, const float *before, float *gates, float *cell, float *squashed, float *hidden)
{
    vec s[ROWS][COLUMNS] = {0};
    outer_products(R, C, s, h, units, 1, u, units, C * LANES, 0);
    EACH (int r = 0; r < R; r++, before += units, gates += C * units, cell += units, squashed += units) {
        EACH (int k = 0; k < C; k++) s[r][k] += load(gates + k * units) + load(bias + k * units);
        store(hidden + r * units, lstm_unit(s[r], peephole, units, before, gates, cell, squashed));
    }
}

/* An LSTM with bias [4, units] (o, i, f, g) and peepholes [3, units] (o, i, f) over `steps`, of which step t has the
 * first count[t] of n examples, never more than the step before. Arrays hold step after step: gates [Σ count, 4, units],
 * which hold W x and take the gates' values, and squashed [Σ count, units], which takes tanh(cell); cells and hidden
 * [n + Σ count, units] begin with the start. u [units / LANES, units, 4, LANES]; units are a multiple of LANES. */
void fl_lstm(const float *u, const float *bias, const float *peephole, const int64_t *count, long steps, long n,
             long units, float *gates, float *cells, float *squashed, float *hidden)
{
    for (long t = 0, line = n * units; t < steps; line = count[t++] * units) {
        for (long k = 0; k < units; k += LANES)
            for (long r = 0; r < count[t]; r += ROWS) {
                long row = r * units, at = row + k;
                const float *uk = u + k * 4 * units, *b = bias + k, *p = peephole + k, *h = hidden + row;
                float *c = cells + at, *z = gates + 4 * row + k, *s = squashed + at, *h1 = hidden + at + line;
                BY_ROWS(lstm_tile, count[t] - r, 4, uk, b, p, units, h, c, z, c + line, s, h1)
            }
        cells += line, hidden += line, gates += 4 * count[t] * units, squashed += count[t] * units;
    }
}

/* C vectors of units of R examples; `after` is the next step's dz [4, units], null at the last. */
INLINE void lstm_back_tile(const int R, const int C, const float *u, const float *peephole, long units, long line,
                           const float *after, const float *dh, const float *gates, const float *cells,
                           const float *squashed, float *dc, float *by, float *dz)
{
    vec s[ROWS][COLUMNS] = {0}, d[4];
    if (after)
        outer_products(R, C, s, after, 4 * units, 1, u, 4 * units, units, 0);
    EACH (int r = 0; r < R; r++)
        EACH (int e = 0; e < C; e++) {
            long unit = e * LANES, at = r * units + unit, wide = 4 * r * units + unit;
            lstm_unit_back(load(dh + at) + s[r][e], peephole + unit, units, cells + at, cells + at + line,
                           gates + wide, squashed + at, dc + at, by + unit, d);
            EACH (int k = 0; k < 4; k++) store(dz + wide + k * units, d[k]);
        }
}

/* Rows up to the end of step t. */
static long rows_until(const int64_t *count, long t)
{
    long rows = 0;
    for (; t >= 0; t--)
        rows += count[t];
    return rows;
}

/* Backward through fl_lstm: dz [Σ count, 4, units] by W x, from dh [Σ count, units] by the hidden states. u [4 units,
 * units] as it is; dc [n, units] is zeros and so is `by` [7, units], which takes what lstm_unit_back tells. */
void fl_lstm_back(const float *u, const float *peephole, const int64_t *count, const float *dh, const float *gates,
                  const float *cells, const float *squashed, long steps, long n, long units, float *dc, float *by,
                  float *dz)
{
    long now = rows_until(count, steps - 1);
    for (long t = steps - 1; t >= 0; t--) {
        long line = t ? count[t - 1] : n, before, goes_on = t + 1 < steps ? count[t + 1] : 0;
        now -= count[t], before = n + now - line;
        for (long k = 0, wide; k < units; k += wide) {
            wide = units - k >= COLUMNS * LANES ? COLUMNS * LANES : LANES;
            for (long r = 0, end; r < count[t]; r = smaller(r + ROWS, end)) {
                end = r < goes_on ? goes_on : count[t];
                long at = (now + r) * units + k, z = 4 * (now + r) * units;
                const float *after = r < goes_on ? dz + z + 4 * count[t] * units : 0, *uk = u + k, *p = peephole + k;
                const float *c = cells + (before + r) * units + k, *s = squashed + at, *g = gates + z + k;
                float *to_c = dc + r * units + k, *to_k = by + k, *to_z = dz + z + k;
#define BACK(C) \
    BY_ROWS(lstm_back_tile, end - r, C, uk, p, units, line * units, after, dh + at, g, c, s, to_c, to_k, to_z)
                if (wide == LANES)
                    BACK(1)
                else
                    BACK(COLUMNS)
            }
        }
    }
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAIRS 16 /* of bfloat16 in a row of a tile */

/* Whether this process may use tiles: Linux wants to be asked. */
int fl_tiles(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

typedef struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tiles;

/* Tiles 0 to 3 take sums and 4 a factor of `rows` rows, 5 to 7 the other factor. */
static void lay_out(long rows)
{
    tiles wanted = {.palette = 1};
    for (int i = 0; i < 8; i++)
        wanted.bytes[i] = 4 * PAIRS, wanted.rows[i] = i < 5 ? rows : PAIRS;
    _tile_loadconfig(&wanted);
}

/* s [rows, 4 LANES] = a b of as many rows of a as are laid out, `stride` bytes apart, and 4 LANES columns of b
 * [k / 2 PAIRS, 4, PAIRS, LANES, 2]; products are exact, their sums in float. */
INLINE void tile_product(const int16_t *a, long stride, const int16_t *b, long k, float *s)
{
    const int tile = 2 * PAIRS * LANES, row = 4 * PAIRS, line = 16 * LANES;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    __asm__ volatile("" ::: "memory"); /* GCC does not know that tiles are loaded from memory */
    for (; k > 0; k -= 2 * PAIRS, a += 2 * PAIRS, b += 4 * tile) {
        _tile_loadd(4, a, stride);
        _tile_loadd(5, b, row); _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, b + tile, row); _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, b + 2 * tile, row); _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, b + 3 * tile, row); _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, s, line); _tile_stored(1, s + LANES, line);
    _tile_stored(2, s + 2 * LANES, line); _tile_stored(3, s + 3 * LANES, line);
}

/* Puts the tiles back as they were before, empty. */
static void leave(const tiles *before)
{
    if (before->palette)
        _tile_loadconfig(before);
    else
        _tile_release();
}

INLINE vec load_short(const int16_t *p)
{
    return (vec)(__builtin_convertvector(*(const few_shorts *)p, ints) << 16);
}

INLINE void store_short(int16_t *p, vec v)
{
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &rounded, sizeof rounded);
}

/* fl_lstm with products in bfloat16: z [Σ count, 4, units] is W x, u [units / LANES, units / 2 PAIRS, 4, PAIRS, LANES,
 * 2]; hidden [Σ count, units] goes to `rounded` [n + Σ count, units] too, which begins with the start. */
void fl_lstm_short(const int16_t *u, const float *bias, const float *peephole, const int64_t *count, const int16_t *z,
                   long steps, long n, long units, float *gates, float *cells, float *squashed, float *hidden,
                   int16_t *rounded)
{
    float sums[PAIRS * 4 * LANES];
    tiles before;
    _tile_storeconfig(&before);
    for (long first = 0; first < n; first += PAIRS)
        for (long t = 0, rows = 0, now = first, line = n; t < steps && count[t] > first; t++) {
            if (rows != smaller(PAIRS, count[t] - first))
                lay_out(rows = smaller(PAIRS, count[t] - first));
            for (long unit = 0; unit < units; unit += LANES) {
                const int16_t *h = rounded + (now + n - line) * units;
                tile_product(h, 2 * units, u + unit * 4 * units, units, sums);
                for (long r = 0; r < rows; r++) {
                    long at = (now + r) * units + unit, wide = 4 * (now + r) * units + unit, next = at + n * units;
                    vec s[4], y;
                    EACH (int k = 0; k < 4; k++)
                        s[k] = load(sums + (4 * r + k) * LANES) + load_short(z + wide + k * units)
                             + load(bias + k * units + unit);
                    y = lstm_unit(s, peephole + unit, units, cells + next - line * units, gates + wide, cells + next,
                                  squashed + at);
                    store(hidden + at, y);
                    store_short(rounded + next, y);
                }
            }
            now += line = count[t];
        }
    leave(&before);
}

/* Backward through it, dz in bfloat16. u [units / 4 LANES, 4 units / 2 PAIRS, 4, PAIRS, LANES, 2]. */
void fl_lstm_back_short(const int16_t *u, const float *peephole, const int64_t *count, const float *dh,
                        const float *gates, const float *cells, const float *squashed, long steps, long n, long units,
                        float *dc, float *by, int16_t *dz)
{
    float sums[PAIRS * 4 * LANES];
    tiles before;
    _tile_storeconfig(&before);
    for (long first = 0; first < n; first += PAIRS) {
        long now = first + rows_until(count, steps - 1), laid = 0;
        for (long t = steps - 1; t >= 0; t--) {
            long rows = smaller(PAIRS, count[t] - first), line = (t ? count[t - 1] : n) * units;
            long goes_on = t + 1 < steps ? smaller(PAIRS, count[t + 1] - first) : 0;
            now -= count[t];
            if (goes_on > 0 && goes_on != laid)
                lay_out(laid = goes_on);
            for (long k = 0; k < units && rows > 0; k += 4 * LANES) {
                memset(sums, 0, sizeof sums);
                if (goes_on > 0)
                    tile_product(dz + 4 * (now + count[t]) * units, 8 * units, u + k * 4 * units, 4 * units, sums);
                for (long e = 0; e < 4 * rows; e++) {
                    long unit = k + e % 4 * LANES, row = (now + e / 4) * units, at = row + unit, wide = 4 * row + unit;
                    const float *cell = cells + at + n * units;
                    vec d[4];
                    lstm_unit_back(load(dh + at) + load(sums + e * LANES), peephole + unit, units, cell - line, cell,
                                   gates + wide, squashed + at, dc + (first + e / 4) * units + unit, by + unit, d);
                    EACH (int gate = 0; gate < 4; gate++) store_short(dz + wide + gate * units, d[gate]);
                }
            }
        }
    }
    leave(&before);
}

#else

int fl_tiles(void) { return 0; }

#endif

/* Max pooling of relu(z), z [n, h, w, c], over 2 x 2 windows: y [n, h / 2, w / 2, c], and `which` of a window's
 * places, row by row, holds its first maximum; NOWHERE where no value is above 0. */
#define NOWHERE 4

void fl_relu_pool(const float *z, long n, long h, long w, long c, float *y, int32_t *which)
{
    for (long k = 0; k < n * (h / 2) * (w / 2); k++, y += c, which += c) {
        long image = k / ((h / 2) * (w / 2)), i = k / (w / 2) % (h / 2), j = k % (w / 2), e = 0;
        const float *a = z + ((image * h + 2 * i) * w + 2 * j) * c, *b = a + w * c;
        for (; e + LANES <= c; e += LANES) {
            vec most = load(a + e), next;
            ints at = {0}, larger;
#define CONSIDER(from, place)                                   \
    next = load(from), larger = (next > most) | (next != next), \
    most = choose(larger, next, most),                          \
    at = (larger & (place - (ints){0})) | (~larger & at)
            CONSIDER(a + e + c, 1);
            CONSIDER(b + e, 2);
            CONSIDER(b + e + c, 3);
            ints nowhere = ~(most > 0);
            store(y + e, choose(most < 0, (vec){0}, most));
            *(ints *)(which + e) = (nowhere & (NOWHERE - (ints){0})) | (~nowhere & at);
        }
        for (; e < c; e++) {
            const float four[] = {a[e], a[e + c], b[e], b[e + c]};
            int32_t at = 0;
            for (int place = 1; place < 4; place++)
                at = four[place] > four[at] || four[place] != four[place] ? place : at;
            y[e] = activate(four[at], RELU);
            which[e] = four[at] > 0 ? at : NOWHERE;
        }
    }
}

/* NaNs of bfloat16 without their sign, as which they are larger than any number. */
INLINE shorts unsigned_nan(shorts z)
{
    return z & ~((z > all_short(-128)) & (z < 0) & all_short(INT16_MIN));
}

/* The same of z in bfloat16, whose numbers above 0 are ordered like the 16-bit integers of the same bits. */
void fl_relu_pool_short(const int16_t *z, long n, long h, long w, long c, int16_t *y, int16_t *which)
{
    for (long k = 0; k < n * (h / 2) * (w / 2); k++, y += c, which += c) {
        long image = k / ((h / 2) * (w / 2)), i = k / (w / 2) % (h / 2), j = k % (w / 2), e = 0;
        const int16_t *a = z + ((image * h + 2 * i) * w + 2 * j) * c, *b = a + w * c, *four[] = {a, a + c, b, b + c};
        for (; e + 2 * LANES <= c; e += 2 * LANES) {
            shorts most = {0}, at = all_short(NOWHERE);
            EACH (int place = 0; place < NOWHERE; place++) {
                shorts next = unsigned_nan(*(const shorts *)(four[place] + e)), larger = next > most;
                most = (larger & next) | (~larger & most);
                at = (larger & all_short(place)) | (~larger & at);
            }
            *(shorts *)(y + e) = most;
            *(shorts *)(which + e) = at;
        }
        for (; e < c; e++) {
            y[e] = 0, which[e] = NOWHERE;
            for (int place = 0; place < NOWHERE; place++) {
                int16_t next = unsigned_nan(all_short(four[place][e]))[0];
                if (next > y[e])
                    y[e] = next, which[e] = place;
            }
        }
    }
}

/* Its backward pass: z [n, h, w, c] has d [n, h / 2, w / 2, c] at the places that `which` tells, else zeros. */
void fl_unpool_short(const int16_t *d, const int16_t *which, long n, long h, long w, long c, int16_t *z)
{
    memset(z, 0, n * h * w * c * sizeof *z);
    for (long k = 0; k < n * (h / 2) * (w / 2); k++, d += c, which += c) {
        long image = k / ((h / 2) * (w / 2)), i = k / (w / 2) % (h / 2), j = k % (w / 2), e = 0;
        int16_t *a = z + ((image * h + 2 * i) * w + 2 * j) * c, *b = a + w * c, *four[] = {a, a + c, b, b + c};
        for (; e + 2 * LANES <= c; e += 2 * LANES)
            EACH (int place = 0; place < NOWHERE; place++)
                *(shorts *)(four[place] + e) = *(const shorts *)(d + e) & (*(const shorts *)(which + e) == all_short(place));
        for (; e < c; e++)
            if (which[e] != NOWHERE)
                four[which[e]][e] = d[e];
    }
}

/* An image with a margin of zeros: [h + 2 ph, w + 2 pw, c] from [h, w, c]. */
static void pad(const float *x, long h, long w, long c, long ph, long pw, float *wide)
{
    long line = (w + 2 * pw) * c;
    memset(wide, 0, (h + 2 * ph) * line * sizeof(float));
    for (long i = 0; i < h; i++)
        memcpy(wide + (ph + i) * line + pw * c, x + i * w * c, w * c * sizeof(float));
}

static void unpad(const float *wide, long h, long w, long c, long ph, long pw, float *x)
{
    long line = (w + 2 * pw) * c;
    for (long i = 0; i < h; i++)
        memcpy(x + i * w * c, wide + (ph + i) * line + pw * c, w * c * sizeof(float));
}

/* g += Σ v · (R lines of V vectors of x from an offset on), over `count` pairs of v and offset; lines lie `line`
 * floats apart in x, `step` apart in g, and the last vector of a line counts `part` floats (0: all). */
INLINE void patch_tile(const int R, const int V, const float *x, const float *values, const int32_t *offsets,
                       long count, long line, float *g, long step, long part)
{
    vec s[5][10];
    EACH (int r = 0; r < R; r++)
        _Pragma("GCC unroll 10") for (int c = 0; c < V; c++) {
            const float *at = g + r * step + c * LANES;
            s[r][c] = part && c == V - 1 ? load_part(at, part) : load(at);
        }
    for (long k = 0; k < count; k++) {
        const float *from = x + offsets[k];
        vec v = all(values[k]);
        EACH (int r = 0; r < R; r++)
            _Pragma("GCC unroll 10") for (int c = 0; c < V; c++) s[r][c] += v * load(from + r * line + c * LANES);
    }
    EACH (int r = 0; r < R; r++)
        _Pragma("GCC unroll 10") for (int c = 0; c < V; c++)
            if (part && c == V - 1)
                memcpy(g + r * step + c * LANES, &s[r][c], part * sizeof(float));
            else
                store(g + r * step + c * LANES, s[r][c]);
}

/* g [lines, wide] += Σ v · (the lines of x that begin at each offset); tiles of up to 20 vectors. */
static void patch_sum(const float *x, const float *values, const int32_t *offsets, long count, long line,
                      long lines, long wide, float *g)
{
    for (long i = 0; i < wide;) {
        long left = wide - i, v = left >= 10 * LANES ? 10 : left > 3 * LANES ? 4 : left > LANES ? 2 : 1;
        long part = left < v * LANES ? left - (v - 1) * LANES : 0;
        for (long r = 0; r < lines;) {
            long high = v < 10 && lines - r >= 5 ? 5 : lines - r >= 2 ? 2 : 1;
            const float *xr = x + r * line + i;
            float *gr = g + r * wide + i;
#define PATCH(R, V) \
    if (high == R && v == V) patch_tile(R, V, xr, values, offsets, count, line, gr, wide, part)
            PATCH(1, 1); PATCH(2, 1); PATCH(5, 1);
            PATCH(1, 2); PATCH(2, 2); PATCH(5, 2);
            PATCH(1, 4); PATCH(2, 4); PATCH(5, 4);
            PATCH(1, 10); PATCH(2, 10);
            r += high;
        }
        i += v * LANES;
    }
}

/* The lines of g that begin at an offset += v · w [lines, wide]; lines lie `line` floats apart in g. */
static void patch_add(const float *w, float v, long line, long lines, long wide, float *g)
{
    for (long r = 0; r < lines; r++, g += line, w += wide) {
        long i = 0;
        EACH (; i + LANES <= wide; i += LANES) store(g + i, load(g + i) + all(v) * load(w + i));
        for (; i < wide; i++)
            g[i] += v * w[i];
    }
}

/* Backward through max pooling of the ReLU of a convolution with stride 1: of a window's four places one at most
 * has a gradient, so sums run over those alone, a quarter of the places or fewer.
 *
 * x [n, h, w, in] went into the convolution with weights wt [out, kh, kw, in] and padding ph, pw; d [n, p, q, out]
 * is the gradient by the pooled output, `which` as from fl_relu_pool. Gives gx like x (null: not wanted), gw like
 * wt, gb [out]. Room: wide, gwide for a padded image [h + 2 ph, w + 2 pw, in] and LANES floats, values and offsets
 * for out · p · q. Images go one after the other, each of which stays in the first cache.
 */
void fl_conv_pool_back(const float *x, const float *wt, const float *d, const int32_t *which, long n, long h,
                       long w, long in, long out, long kh, long kw, long ph, long pw, float *gx, float *gw,
                       float *gb, float *wide, float *gwide, float *values, int32_t *offsets)
{
    long line = (w + 2 * pw) * in, image = (h + 2 * ph) * line, patch = kh * kw * in, count[out];
    long p = (h + 2 * ph - kh + 1) / 2, q = (w + 2 * pw - kw + 1) / 2, most = p * q;
    memset(gw, 0, out * patch * sizeof(float));
    memset(gb, 0, out * sizeof(float));
    memset(wide + image, 0, LANES * sizeof(float));
    for (long k = 0; k < n; k++, d += most * out, which += most * out) {
        memset(count, 0, sizeof count);
        for (long at = 0; at < most; at++) {
            int32_t corner = at / q * 2 * line + at % q * 2 * in;
            int32_t place[NOWHERE] = {corner, corner + in, corner + line, corner + line + in};
            for (long o = 0; o < out; o++)
                if (which[at * out + o] != NOWHERE) {
                    long next = o * most + count[o]++;
                    values[next] = d[at * out + o];
                    offsets[next] = place[which[at * out + o]];
                    gb[o] += d[at * out + o];
                }
        }
        pad(x + k * h * w * in, h, w, in, ph, pw, wide);
        for (long o = 0; o < out; o++)
            patch_sum(wide, values + o * most, offsets + o * most, count[o], line, kh, kw * in, gw + o * patch);
        if (!gx)
            continue;
        memset(gwide, 0, image * sizeof(float));
        for (long o = 0; o < out; o++)
            for (long e = o * most; e < o * most + count[o]; e++)
                patch_add(wt + o * patch, values[e], line, kh, kw * in, gwide + offsets[e]);
        unpad(gwide, h, w, in, ph, pw, gx + k * h * w * in);
    }
}

/* g [rows of a patch][its columns, `wide` a row][LANES outputs] += what R rows and V columns of it take from one
 * image x with its margin: of each window's four places, the one that `which` tells has the gradient d. */
INLINE void few_taps(const int R, const int V, const float *x, const int16_t *d, const int16_t *which, long p, long q,
                     long line, long in, long wide, long out, float *g)
{
    vec s[5][5];
    EACH (int r = 0; r < R; r++)
        EACH (int c = 0; c < V; c++) s[r][c] = load(g + (r * wide + c) * out);
    for (long i = 0; i < p; i++)
        for (long j = 0; j < q; j++, d += out, which += out) {
            ints at = __builtin_convertvector(*(const few_shorts *)which, ints);
            ints v = __builtin_convertvector(*(const few_shorts *)d, ints) << 16;
            EACH (int place = 0; place < NOWHERE; place++) {
                const float *from = x + (2 * i + place / 2) * line + (2 * j + place % 2) * in;
                vec here = (vec)(v & (at == place));
                EACH (int r = 0; r < R; r++)
                    EACH (int c = 0; c < V; c++) s[r][c] += here * all(from[r * line + c]);
            }
        }
    EACH (int r = 0; r < R; r++)
        EACH (int c = 0; c < V; c++) store(g + (r * wide + c) * out, s[r][c]);
}

/* Gradients by the weight, g [kh, kw, in, out], and the bias, gb [out], of a convolution with stride 1 and small
 * patches whose ReLU was pooled: x [n, h, w, in] in float, d and `which` [n, p, q, out] as fl_relu_pool_short has
 * them. `out` is a multiple of LANES. Room: wide for an image with its margin. */
void fl_conv_pool_grad_short(const float *x, const int16_t *d, const int16_t *which, long n, long h, long w, long in,
                             long out, long kh, long kw, long ph, long pw, float *g, float *gb, float *wide)
{
    long line = (w + 2 * pw) * in, p = (h + 2 * ph - kh + 1) / 2, q = (w + 2 * pw - kw + 1) / 2;
    memset(g, 0, kh * kw * in * out * sizeof(float));
    memset(gb, 0, out * sizeof(float));
    for (long k = 0; k < n; k++, d += p * q * out, which += p * q * out) {
        pad(x + k * h * w * in, h, w, in, ph, pw, wide);
        for (long o = 0; o < out; o += LANES) {
            for (long at = o; at < p * q * out; at += out) {
                ints v = __builtin_convertvector(*(const few_shorts *)(d + at), ints) << 16;
                ints place = __builtin_convertvector(*(const few_shorts *)(which + at), ints);
                store(gb + o, load(gb + o) + (vec)(v & (place != NOWHERE)));
            }
            for (long r = 0, high; r < kh; r += high) {
                high = kh - r >= 5 ? 5 : kh - r >= 3 ? 3 : 1;
                for (long c = 0, many; c < kw * in; c += many) {
                    many = kw * in - c >= 5 ? 5 : kw * in - c >= 3 ? 3 : 1;
#define TAPS(R, V)                                                                                   \
    if (high == R && many == V)                                                                      \
    few_taps(R, V, wide + r * line + c, d + o, which + o, p, q, line, in, kw * in, out,              \
             g + (r * kw * in + c) * out + o)
                    TAPS(1, 1); TAPS(1, 3); TAPS(1, 5);
                    TAPS(3, 1); TAPS(3, 3); TAPS(3, 5);
                    TAPS(5, 1); TAPS(5, 3); TAPS(5, 5);
                }
            }
        }
    }
}
