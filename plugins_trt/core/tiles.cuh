// How blocks share the tiles of a grouped product whose sizes only the device knows.

#pragma once

#include "step.cuh"

namespace monoedge
{

/// A tile of one expert's product.
struct TilePlace
{
    int expert;
    std::int32_t firstRow; ///< In the expert's list.
    std::int32_t rows;     ///< How many of the list from there on; at least 1, may exceed a tile.
    std::int32_t firstColumn;
};

/// Calls `function` with each tile that falls to this block. Neighbouring blocks work on the same columns, so the
/// others find in L2 what one reads of a matrix. An expert without rows has no tiles.
template <typename Function>
__device__ void forEachTile(Step const& step, std::int32_t tileRows, std::int32_t tileColumns, Function&& function)
{
    std::int32_t const textCount = step.routing.counts[0];
    std::int32_t const visualCount = step.routing.counts[1];
    std::int32_t const textTiles = (textCount + tileRows - 1) / tileRows;
    std::int32_t const rowTiles = textTiles + (visualCount + tileRows - 1) / tileRows;
    std::int64_t const tiles = static_cast<std::int64_t>(rowTiles) * ((step.out + tileColumns - 1) / tileColumns);
    for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x)
    {
        auto const rowTile = static_cast<std::int32_t>(tile % rowTiles);
        TilePlace place;
        place.expert = rowTile < textTiles ? 0 : 1;
        place.firstRow = (place.expert == 0 ? rowTile : rowTile - textTiles) * tileRows;
        place.rows = (place.expert == 0 ? textCount : visualCount) - place.firstRow;
        place.firstColumn = static_cast<std::int32_t>(tile / rowTiles) * tileColumns;
        function(place);
    }
}

/// The most tiles that there can be.
inline std::int64_t mostTiles(std::int64_t rows, std::int64_t out, std::int64_t tileRows, std::int64_t tileColumns)
{
    // Two experts can each leave one tile of rows partly filled.
    std::int64_t const rowTiles = (rows + tileRows - 1) / tileRows + (rows > 1 ? 1 : 0);
    return rowTiles * ((out + tileColumns - 1) / tileColumns);
}

} // namespace monoedge
