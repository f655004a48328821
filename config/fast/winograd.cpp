// Winograd's convolution F(4x4, 5x5) (see winograd.py) in one pass over the memory: a few tiles at a time go from their
// pixels to the values at the points, through the products with the matrices, and back, while they stay in a core's cache.

#include <cstdint>
#include <vector>

using Index = std::int64_t;

// Images of float32 with the channels of a pixel side by side: pixel (n, y, x) lies at
// data + n * image + y * row + (x % 4) * place + (x / 4) * tile. Outside of height and width there are zeros.
struct Images {
    float *data;
    Index image, row, place, tile, height, width, channels;
    Index top, left;  // pixel (y, x) at which the first tile, or its window, begins; may be negative
};

namespace {

constexpr int TILE = 4, POINTS = 8;

// No wider than the registers: GCC takes a wider vector apart in memory, which is ten times as slow (GCC 12).
#if defined __AVX512F__
typedef float Wide __attribute__((vector_size(64)));
typedef float Narrow __attribute__((vector_size(32)));
#elif defined __AVX__
typedef float Wide __attribute__((vector_size(32)));
typedef Wide Narrow;
#else
typedef float Wide __attribute__((vector_size(16)));
typedef Wide Narrow;
#endif

constexpr int LANES = sizeof(Wide) / sizeof(float);

// Eight pixels of a window to their values at the points, in one dimension. A value at p and one at -p are the sum and
// the difference of even and odd terms.
template <class Vector> inline void to_points(const Vector *x, Vector *out, Index step) {
    out[0] = x[0] - x[6] + 5.25f * (x[4] - x[2]);
    out[7 * step] = x[7] - x[1] + 5.25f * (x[3] - x[5]);
    const auto both = [&](int plus, float first, float last, float middle, float scale) {
        const Vector even = first * x[2] + middle * x[4] + last * x[6];
        const Vector odd = scale * (first * x[1] + middle * x[3] + last * x[5]);
        out[plus * step] = even + odd;
        out[(plus + 1) * step] = even - odd;
    };
    both(1, 1, 1, -4.25f, 1);
    both(3, 1, 4, -5, 2);
    both(5, 4, 1, -5, 0.5f);
}

// Eight values at the points to four outputs, in one dimension.
template <class Vector> inline void from_points(const Vector *m, Vector *out, Index step) {
    const Vector s1 = m[1] + m[2], s2 = m[3] + m[4], s3 = m[5] + m[6];
    const Vector d1 = m[1] - m[2], d2 = m[3] - m[4], d3 = m[5] - m[6];
    out[0] = m[0] + s1 + s2 + s3;
    out[step] = d1 + 2 * d2 + 0.5f * d3;
    out[2 * step] = s1 + 4 * s2 + 0.25f * s3;
    out[3 * step] = m[7] + d1 + 8 * d2 + 0.125f * d3;
}

// The transpose of from_points, by which its gradient flows.
template <class Vector> inline void from_points_transposed(const Vector *y, Vector *out, Index step) {
    out[0] = y[0];
    out[7 * step] = y[3];
    const auto both = [&](int plus, float p) {
        const Vector even = y[0] + p * p * y[2], odd = p * (y[1] + p * p * y[3]);
        out[plus * step] = even + odd;
        out[(plus + 1) * step] = even - odd;
    };
    both(1, 1);
    both(3, 2);
    both(5, 0.5f);
}

// Where the pixels of a tile, or of a window, lie: the same distances for all of them.
template <int SIDE> struct Pixels {
    const Images &images;
    Index distance[SIDE];  // of a column from that of pixel x = 0, in a tile that begins at images.left

    explicit Pixels(const Images &images) : images(images) {
        for (int x = 0; x < SIDE; x++) {
            const Index place = ((images.left + x) % TILE + TILE) % TILE;
            distance[x] = place * images.place + (images.left + x - place) / TILE * images.tile;
        }
    }
    bool inside(Index y, Index x) const { return y >= 0 && y < images.height && x >= 0 && x < images.width; }
};

// Pieces of the channels as wide as a vector; the last one overlaps the one before it.
template <class Vector, class Body> inline void for_channels(Index channels, const Body &body) {
    constexpr Index width = sizeof(Vector) / sizeof(float);
    for (Index c = 0; c < channels; c += width) body(c + width <= channels ? c : channels - width);
}

// A vector at any address. (GCC 12 takes one that std::memcpy moves through the stack, by halves.)
template <class Vector> struct __attribute__((packed, may_alias)) Anywhere {
    Vector vector;
};

template <class Vector> inline Vector load(const float *address) {
    return reinterpret_cast<const Anywhere<Vector> *>(address)->vector;
}

template <class Vector> inline void store(const Vector &vector, float *address) {
    reinterpret_cast<Anywhere<Vector> *>(address)->vector = vector;
}

// One tile or window of SIDE x SIDE pixels to its 64 values, in the channels that one vector holds; `pixel` reads one.
template <class Vector, int SIDE, class Pixel> inline void tile_to_values(float *result, Index point, Pixel pixel) {
    Vector by_column[POINTS * SIDE], line[SIDE], out[POINTS];
    for (int y = 0; y < SIDE; y++) {
        for (int x = 0; x < SIDE; x++) line[x] = pixel(y, x);
        if constexpr (SIDE == POINTS)
            to_points(line, by_column + y, SIDE);
        else
            from_points_transposed(line, by_column + y, SIDE);
    }
    for (int x = 0; x < POINTS; x++) {
        if constexpr (SIDE == POINTS)
            to_points(by_column + SIDE * x, out, 1);
        else
            from_points_transposed(by_column + SIDE * x, out, 1);
        for (int y = 0; y < POINTS; y++) store(out[y], result + (y * POINTS + x) * point);
    }
}

// The 64 values of one tile to its pixels; `pixel` writes one.
template <class Vector, class Pixel> inline void values_to_tile(const float *source, Index point, Pixel pixel) {
    Vector by_column[TILE * POINTS], line[POINTS], out[TILE];
    for (int x = 0; x < POINTS; x++) {
        for (int y = 0; y < POINTS; y++) line[y] = load<Vector>(source + (y * POINTS + x) * point);
        from_points(line, by_column + x, POINTS);
    }
    for (int y = 0; y < TILE; y++) {
        from_points(by_column + POINTS * y, out, 1);
        for (int x = 0; x < TILE; x++) pixel(y, x, out[x]);
    }
}

// The window or tile of `inputs` that begins at row `TILE * r` and column `TILE * t` to its values from `result` on.
// The inputs lie side by side in the channels of the values: both halves of a line of the cache are written while it is there.
template <class Vector, int SIDE>
void gather(const Images *inputs, Index count, Index n, Index r, Index t, float *result, Index point) {
    for (const Images *images = inputs; images < inputs + count; result += images++->channels) {
        const Pixels<SIDE> pixels(*images);
        const Index top = images->top + TILE * r, left = images->left + TILE * t;
        const float *tile = images->data + n * images->image + top * images->row + t * images->tile;
        const bool inside = pixels.inside(top, left) && pixels.inside(top + SIDE - 1, left + SIDE - 1);
        for_channels<Vector>(images->channels, [&](Index c) {
            const auto whole = [&](int y, int x) {
                return load<Vector>(tile + y * images->row + pixels.distance[x] + c);
            };
            const auto part = [&](int y, int x) { return pixels.inside(top + y, left + x) ? whole(y, x) : Vector{}; };
            inside ? tile_to_values<Vector, SIDE>(result + c, point, whole)
                   : tile_to_values<Vector, SIDE>(result + c, point, part);
        });
    }
}

// The reverse of it: values to the pixels of a tile.
template <class Vector>
void scatter(const Images *outputs, Index count, Index n, Index r, Index t, const float *source, Index point) {
    for (const Images *images = outputs; images < outputs + count; source += images++->channels) {
        const Pixels<TILE> pixels(*images);
        const Index top = images->top + TILE * r, left = images->left + TILE * t;
        float *tile = images->data + n * images->image + top * images->row + t * images->tile;
        const bool inside = pixels.inside(top, left) && pixels.inside(top + TILE - 1, left + TILE - 1);
        for_channels<Vector>(images->channels, [&](Index c) {
            const auto whole = [&](int y, int x, const Vector &v) {
                store(v, tile + y * images->row + pixels.distance[x] + c);
            };
            const auto part = [&](int y, int x, const Vector &v) {
                if (pixels.inside(top + y, left + x)) whole(y, x, v);
            };
            inside ? values_to_tile<Vector>(source + c, point, whole) : values_to_tile<Vector>(source + c, point, part);
        });
    }
}

// Wide vectors where all have as many channels as lanes, else narrow ones, which they must fill (winograd.CHANNELS).
bool wide(const Images *images, Index count) {
    for (Index k = 0; k < count; k++)
        if (images[k].channels < LANES) return false;
    return true;
}

template <int SIDE> auto gather_of(const Images *inputs, Index count) {
    return wide(inputs, count) ? gather<Wide, SIDE> : gather<Narrow, SIDE>;
}

auto scatter_of(const Images *outputs, Index count) { return wide(outputs, count) ? scatter<Wide> : scatter<Narrow>; }

Index channels_of(const Images *images, Index count) {
    Index sum = 0;
    for (Index k = 0; k < count; k++) sum += images[k].channels;
    return sum;
}

constexpr Index multiple(Index count, Index of) { return (count + of - 1) / of * of; }

// Of a product, what is summed in registers: at most MOST columns, and as many rows as there is room for beside a row of
// the second factor and one number of the first.
constexpr Index MOST = LANES >= 8 ? 40 : 8;
constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int rows_of(Index width) {
    const Index vectors = multiple(width, LANES) / LANES, rows = (REGISTERS - 1) / vectors - 1;
    return rows < 8 ? rows : 8;
}
constexpr Index COLUMNS = 8;  // a multiple of it
constexpr Index BLOCK = 16;  // tiles that a thread works on at once, so that their values stay in its own cache

// Where the factors of a matrix product lie: the sums over k of a[r * a_row + k * a_step] * b[k * b_row + column].
struct Factors {
    const float *a;
    Index a_row, a_step;
    const float *b;
    Index b_row, count;  // of k
};

// HIGH rows and WIDTH columns of the product, written to `c` or added to it. The loops over vectors are unrolled early,
// or GCC 12 would keep the sums in memory.
template <Index WIDTH, int HIGH, bool ADD> inline void piece(const Factors &f, float *c, Index c_row) {
    constexpr int WIDE = WIDTH / LANES;
    constexpr bool HALF = WIDTH % LANES > 0;
    Wide sums[HIGH][WIDE + 1];  // never empty
    Narrow half[HIGH];
#pragma GCC unroll 8
    for (int r = 0; r < HIGH; r++) {
#pragma GCC unroll 8
        for (int w = 0; w < WIDE; w++) sums[r][w] = ADD ? load<Wide>(c + r * c_row + LANES * w) : Wide{};
        if (HALF) half[r] = ADD ? load<Narrow>(c + r * c_row + LANES * WIDE) : Narrow{};
    }
    const float *a = f.a, *b = f.b;
    for (Index k = 0; k < f.count; k++, a += f.a_step, b += f.b_row) {
        Wide b_wide[WIDE + 1];
        Narrow b_half{};
#pragma GCC unroll 8
        for (int w = 0; w < WIDE; w++) {
            b_wide[w] = load<Wide>(b + LANES * w);
#if defined __AVX__ && !defined __AVX512F__
            asm("" : "+x"(b_wide[w]));  // into a register: GCC 12 would read it from memory for each row
#endif
        }
        if (HALF) b_half = load<Narrow>(b + LANES * WIDE);
#pragma GCC unroll 8
        for (int r = 0; r < HIGH; r++) {
            const float factor = a[r * f.a_row];
#pragma GCC unroll 8
            for (int w = 0; w < WIDE; w++) sums[r][w] += b_wide[w] * factor;
            if (HALF) half[r] += b_half * factor;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < HIGH; r++) {
#pragma GCC unroll 8
        for (int w = 0; w < WIDE; w++) store(sums[r][w], c + r * c_row + LANES * w);
        if (HALF) store(half[r], c + r * c_row + LANES * WIDE);
    }
}

// All rows of WIDTH columns.
template <Index WIDTH, bool ADD> void strip(Factors f, float *c, Index c_row, Index rows) {
    constexpr int ROWS = rows_of(WIDTH);
    for (; rows >= ROWS; rows -= ROWS, f.a += ROWS * f.a_row, c += ROWS * c_row) piece<WIDTH, ROWS, ADD>(f, c, c_row);
    for (; rows > 0; rows--, f.a += f.a_row, c += c_row) piece<WIDTH, 1, ADD>(f, c, c_row);
}

// `rows` and `columns`, a multiple of COLUMNS, of the product.
template <bool ADD> void product(Factors f, float *c, Index c_row, Index rows, Index columns) {
    for (Index left = columns; left > 0;) {
        const Index width = left >= MOST ? MOST : left;
        const auto one = width == MOST ? strip<MOST, ADD> : width == 32 ? strip<32, ADD> : width == 24 ? strip<24, ADD>
                       : width == 16 ? strip<16, ADD> : strip<8, ADD>;
        one(f, c, c_row, rows);
        f.b += width;
        c += width;
        left -= width;
    }
}

// The 64 values of each tile and channel of a block, and memory for them, which a thread keeps: value p of tile i lies
// at data + p * point + i * tile.
struct Block {
    float *data;
    Index point, tile;

    // An odd number of lines of the cache from point to point: 64 addresses in steps of a power of two would share one
    // place of it.
    static Index step(Index channels) { return 16 * (multiple(BLOCK * channels, 16) / 16 | 1); }
    static float *memory(Index count) {
        thread_local std::vector<Wide> kept;
        if (Index(kept.size()) < count / LANES) kept.resize(count / LANES);
        return reinterpret_cast<float *>(kept.data());
    }
    Block(float *data, Index channels) : data(data), point(step(channels)), tile(channels) {}
};

// All tiles of `images` in blocks, shared out to threads: body(thread, count, place), where place(i, f) calls
// f(image, row, column) with the place of tile i of `count`.
template <class Body> void for_blocks(Index number, const Images &images, Index threads, const Body &body) {
    const Index columns = multiple(images.width, TILE) / TILE, rows = multiple(images.height, TILE) / TILE;
    const Index all = number * rows * columns, blocks = multiple(all, BLOCK) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (Index thread = 0; thread < threads; thread++)
        for (Index block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
            const Index first = BLOCK * block, count = all - first < BLOCK ? all - first : BLOCK;
            body(thread, count, [&](Index i, const auto &at) {
                const Index tile = first + i;
                at(tile / (rows * columns), tile / columns % rows, tile % columns);
            });
        }
}

}  // namespace

// Convolution of `number` images `inputs` with `matrices` (64, channels of the inputs, columns), `bias` (columns) added;
// columns are the channels of the outputs, filled up to a multiple of 8. The tiles are those that cover the outputs.
extern "C" void convolve(const Images *inputs, Index input_count, const Images *outputs, Index output_count, Index number,
                         const float *matrices, const float *bias, Index threads) {
    const Index channels = channels_of(inputs, input_count);
    const Index columns = multiple(channels_of(outputs, output_count), COLUMNS);
    const auto gather = gather_of<POINTS>(inputs, input_count);
    const auto scatter = scatter_of(outputs, output_count);
    for_blocks(number, *outputs, threads, [&](Index, Index count, const auto &place) {
        const Index size = POINTS * POINTS * Block::step(channels);
        float *memory = Block::memory(size + POINTS * POINTS * Block::step(columns));
        const Block windows(memory, channels), results(memory + size, columns);
        for (Index i = 0; i < count; i++)
            place(i, [&](Index n, Index r, Index t) {
                gather(inputs, input_count, n, r, t, windows.data + i * windows.tile, windows.point);
            });
        for (Index p = 0; p < POINTS * POINTS; p++)
            product<false>(
                {windows.data + p * windows.point, windows.tile, 1, matrices + p * channels * columns, columns, channels},
                results.data + p * results.point, columns, count, columns);
        float *constant = results.data + (POINTS + 1) * results.point;  // the value at (1, 1) goes into all outputs alike
        for (Index i = 0; i < count && bias; i++)
            for (Index c = 0; c < columns; c++) constant[i * columns + c] += bias[c];
        for (Index i = 0; i < count; i++)
            place(i, [&](Index n, Index r, Index t) {
                scatter(outputs, output_count, n, r, t, results.data + i * results.tile, results.point);
            });
    });
}

// The gradient of `matrices` from the inputs and the gradient of the output: to `totals`, (threads, 64, rows, columns) of
// zeros, each thread adds its part. Rows and columns are the channels of both, filled up to multiples of 8.
extern "C" void matrices_gradient(const Images *inputs, Index input_count, const Images *gradient, Index number,
                                  float *totals, Index threads) {
    const Index rows = multiple(channels_of(inputs, input_count), COLUMNS), columns = multiple(gradient->channels, COLUMNS);
    const auto gather_windows = gather_of<POINTS>(inputs, input_count);
    const auto gather_tiles = gather_of<TILE>(gradient, 1);
    for_blocks(number, *inputs, threads, [&](Index thread, Index count, const auto &place) {
        const Index size = POINTS * POINTS * Block::step(rows);
        float *memory = Block::memory(size + POINTS * POINTS * Block::step(columns));
        const Block windows(memory, rows), tiles(memory + size, columns);
        for (Index i = 0; i < count; i++)
            place(i, [&](Index n, Index r, Index t) {
                gather_windows(inputs, input_count, n, r, t, windows.data + i * windows.tile, windows.point);
                gather_tiles(gradient, 1, n, r, t, tiles.data + i * tiles.tile, tiles.point);
            });
        for (Index p = 0; p < POINTS * POINTS; p++)
            product<true>(
                {windows.data + p * windows.point, 1, windows.tile, tiles.data + p * tiles.point, tiles.tile, count},
                totals + (thread * POINTS * POINTS + p) * rows * columns, columns, rows, columns);
    });
}
