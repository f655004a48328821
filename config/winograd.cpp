// The sums of winograd.py in one pass over the memory: whole tiles, all channels, in the processor's registers.
//
// native.py compiles this where there is a compiler. The formulas are those of winograd.py, which does without.

#include <cstdint>
#include <cstring>

using Index = std::int64_t;

// Images of float32 with the channels of a pixel side by side: pixel (n, y, x) lies at
// data + n * image + y * row + (x % 4) * place + (x / 4) * tile. Outside of height and width there are zeros.
struct Images {
    float *data;
    Index image, row, place, tile, height, width, channels;
    Index top, left;  // pixel (y, x) at which the first tile, or its window, begins; may be negative
};

// The 64 values of each tile and channel: value k of tile i lies at data + k * point + i * tile.
struct Values {
    float *data;
    Index point, tile;
    Index images, rows, columns;  // tiles
};

namespace {

constexpr int TILE = 4, POINTS = 8;

typedef float Sixteen __attribute__((vector_size(64)));
typedef float Eight __attribute__((vector_size(32)));

// Eight pixels of a window to their values at the points: winograd._to_points.
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

// Eight values at the points to four outputs: winograd._from_points.
template <class Vector> inline void from_points(const Vector *m, Vector *out, Index step) {
    const Vector s1 = m[1] + m[2], s2 = m[3] + m[4], s3 = m[5] + m[6];
    const Vector d1 = m[1] - m[2], d2 = m[3] - m[4], d3 = m[5] - m[6];
    out[0] = m[0] + s1 + s2 + s3;
    out[step] = d1 + 2 * d2 + 0.5f * d3;
    out[2 * step] = s1 + 4 * s2 + 0.25f * s3;
    out[3 * step] = m[7] + d1 + 8 * d2 + 0.125f * d3;
}

// The transpose of from_points: winograd._from_points_transposed.
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

// All tiles with `work(image, row, column, number)`, shared out to threads by their rows.
template <class Work> void for_tiles(const Values &values, Index threads, const Work &work) {
    const Index rows = values.images * values.rows;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (Index row = 0; row < rows; row++)
        for (Index column = 0; column < values.columns; column++)
            work(row / values.rows, row % values.rows, column, row * values.columns + column);
}

// Pieces of the channels as wide as a vector; the last one overlaps the one before it.
template <class Vector, class Work> inline void for_channels(Index channels, const Work &work) {
    constexpr Index width = sizeof(Vector) / sizeof(float);
    for (Index c = 0; c < channels; c += width) work(c + width <= channels ? c : channels - width);
}

template <class Vector> inline Vector load(const float *address) {
    Vector vector;
    std::memcpy(&vector, address, sizeof(Vector));
    return vector;
}

template <class Vector> inline void store(const Vector &vector, float *address) {
    std::memcpy(address, &vector, sizeof(Vector));
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

// `inputs` lie side by side in the channels of the values: both halves of a line of the cache are written while it is there.
template <class Vector, int SIDE> void gather(const Images *inputs, Index count, const Values &values, Index threads) {
    for_tiles(values, threads, [&](Index n, Index r, Index t, Index number) {
        float *result = values.data + number * values.tile;
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
                inside ? tile_to_values<Vector, SIDE>(result + c, values.point, whole)
                       : tile_to_values<Vector, SIDE>(result + c, values.point, part);
            });
        }
    });
}

template <class Vector> void scatter(const Images &images, const Values &values, Index threads) {
    const Pixels<TILE> pixels(images);
    for_tiles(values, threads, [&](Index n, Index r, Index t, Index number) {
        const Index top = images.top + TILE * r, left = images.left + TILE * t;
        float *tile = images.data + n * images.image + top * images.row + t * images.tile;
        const bool inside = pixels.inside(top, left) && pixels.inside(top + TILE - 1, left + TILE - 1);
        for_channels<Vector>(images.channels, [&](Index c) {
            const float *source = values.data + number * values.tile + c;
            const auto whole = [&](int y, int x, const Vector &v) {
                store(v, tile + y * images.row + pixels.distance[x] + c);
            };
            const auto part = [&](int y, int x, const Vector &v) {
                if (pixels.inside(top + y, left + x)) whole(y, x, v);
            };
            inside ? values_to_tile<Vector>(source, values.point, whole)
                   : values_to_tile<Vector>(source, values.point, part);
        });
    });
}

// Vectors of sixteen where all have as many channels, else of eight, which they must have.
bool wide(const Images *images, Index count) {
    for (Index k = 0; k < count; k++)
        if (images[k].channels < 16) return false;
    return true;
}

}  // namespace

extern "C" void windows_to_values(const Images *images, Index count, const Values *values, Index threads) {
    (wide(images, count) ? gather<Sixteen, POINTS> : gather<Eight, POINTS>)(images, count, *values, threads);
}

extern "C" void tiles_to_values(const Images *images, Index count, const Values *values, Index threads) {
    (wide(images, count) ? gather<Sixteen, TILE> : gather<Eight, TILE>)(images, count, *values, threads);
}

extern "C" void values_to_tiles(const Images *images, Index count, const Values *values, Index threads) {
    (wide(images, count) ? scatter<Sixteen> : scatter<Eight>)(*images, *values, threads);
}
