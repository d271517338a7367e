// Shows the volumes that the page holds: by NiiVue where there is WebGL 2, else as slices on plain canvases.
const volumes = JSON.parse(document.querySelector("#volumes").textContent);
const control = (id) => document.querySelector(`#${id}`);
const MOST_WITHOUT_A_CARD = 2e6; // voxels: where the processor draws, NiiVue needs minutes for more
const theme = matchMedia("(prefers-color-scheme: dark)");
let viewer; // NiiVue's, also for who wants to go on with it in the browser's console

show().catch((error) => slices(`NiiVue cannot show it here (${error.message}): slices instead.`));

async function show() {
  const gl = document.createElement("canvas").getContext("webgl2");
  if (!gl) throw new Error("this browser has no WebGL 2");
  const drawnBy = gl.getParameter(gl.getExtension("WEBGL_debug_renderer_info")?.UNMASKED_RENDERER_WEBGL ?? gl.RENDERER);
  const voxels = Math.max(...volumes.map(({ shape }) => shape[0] * shape[1] * shape[2]));
  if (/swiftshader|llvmpipe|software|basic render/i.test(drawnBy) && voxels > MOST_WITHOUT_A_CARD) throw new Error("no graphics card draws for this browser, and the processor would need minutes");
  const { Niivue, NVImage, SLICE_TYPE, SHOW_RENDER } = niivue;
  viewer = new Niivue({
    dragAndDropEnabled: false, isColorbar: false, crosshairWidth: 0.5, crosshairWidthUnit: "mm", crosshairColor: [0.34, 0.71, 0.91, 0.8],
    multiplanarShowRender: SHOW_RENDER.NEVER, multiplanarEqualSize: true, logLevel: "error",
  });
  paint();
  await viewer.attachToCanvas(control("viewer"));
  for (const volume of volumes) {
    const image = await NVImage.loadFromBase64({ base64: volume.data, name: `${volume.kind}.nii.gz`, trustCalMinMax: false, ...looks(volume) });
    if (volume.kind === "outline") image.setColormapLabel({ R: [0, volume.colour[0]], G: [0, volume.colour[1]], B: [0, volume.colour[2]], A: [0, 255], I: [0, 1] });
    viewer.addVolume(image);
  }
  const at = (kind) => viewer.volumes.findIndex((image) => image.name === `${kind}.nii.gz`);
  const planes = { multi: SLICE_TYPE.MULTIPLANAR, all: SLICE_TYPE.MULTIPLANAR, axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL, render: SLICE_TYPE.RENDER };
  const set = () => {
    viewer.opts.multiplanarShowRender = control("planes").value === "all" ? SHOW_RENDER.ALWAYS : SHOW_RENDER.NEVER;
    viewer.setSliceType(planes[control("planes").value]);
    if (control("opacity")) viewer.setOpacity(at("map"), Number(control("opacity").value));
    if (control("component")) viewer.setFrame4D(viewer.volumes[at("map")].id, Number(control("component").value));
    if (control("outline")) viewer.setOpacity(at("outline"), control("outline").checked ? 1 : 0);
  };
  set();
  document.querySelector(".controls").addEventListener("input", set);
  theme.addEventListener("change", () => { paint(); viewer.drawScene(); });
  document.body.dataset.shown = "niivue";
}

function looks({ kind, most }) {
  if (kind === "scan") return { colormap: "gray", cal_min: 0, cal_max: most };
  if (kind === "outline") return { opacity: 1, cal_min: 0, cal_max: 1 };
  return { colormap: "warm", colormapNegative: "winter", opacity: 0.6, cal_min: 0.05 * most, cal_max: most, cal_minNeg: -most, cal_maxNeg: -0.05 * most };
}

function paint() {
  viewer.opts.backColor = theme.matches ? [0.08, 0.09, 0.1, 1] : [1, 1, 1, 1];
  viewer.opts.fontColor = theme.matches ? [0.9, 0.9, 0.9, 1] : [0.1, 0.1, 0.1, 1];
}

// --- Without WebGL ---

async function slices(why) {
  control("fallback").textContent = why;
  control("fallback").hidden = false;
  document.querySelector(".viewer").hidden = true;
  document.querySelector(".slices").hidden = false;
  const images = await Promise.all(volumes.map(decoded));
  const figures = [...document.querySelectorAll(".slices figure")];
  for (const [n, figure] of figures.entries()) {
    const axis = 2 - n, slider = figure.querySelector("input");
    slider.max = images[0].shape[axis] - 1;
    slider.value = Math.floor(images[0].shape[axis] / 2);
  }
  const draw = () => {
    for (const [n, figure] of figures.entries()) {
      figure.hidden = !["multi", "all", figure.querySelector("canvas").dataset.plane].includes(control("planes").value);
      drawSlice(figure.querySelector("canvas"), images, 2 - n, Number(figure.querySelector("input").value));
    }
  };
  for (const part of [".controls", ".slices"]) document.querySelector(part).addEventListener("input", draw);
  draw();
  document.body.dataset.shown = "slices";
}

// A volume's numbers, x fastest, and the way from the scan's millimetres to its voxels.
async function decoded({ kind, data, shape, most, colour }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const file = await new Response(stream).arrayBuffer();
  const header = new DataView(file);
  const numbers = header.getInt16(70, true) === 2 ? new Uint8Array(file, 352) : new Int16Array(file, 352);
  const affine = [0, 1, 2].map((row) => [0, 1, 2, 3].map((column) => header.getFloat32(280 + 16 * row + 4 * column, true)));
  const slope = header.getFloat32(112, true) || 1, inter = header.getFloat32(116, true) || 0;
  return { kind, shape, most, colour, numbers, affine, slope, inter };
}

function drawSlice(canvas, images, axis, place) {
  const [across, up] = [0, 1, 2].filter((other) => other !== axis), scan = images[0];
  const [width, height] = [scan.shape[across], scan.shape[up]];
  [canvas.width, canvas.height] = [width, height];
  const size = (column) => Math.hypot(...scan.affine.map((row) => row[column]));
  canvas.style.aspectRatio = `${width * size(across)} / ${height * size(up)}`;
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  const others = images.slice(1).map((image) => [image, between(scan.affine, image.affine)]);
  for (let v = 0; v < height; v++) {
    for (let u = 0; u < width; u++) {
      const voxel = [0, 0, 0];
      [voxel[axis], voxel[across], voxel[up]] = [place, u, v];
      const grey = valueAt(scan, voxel);
      let pixel = [grey, grey, grey];
      for (const [image, [matrix, offset]] of others) {
        const value = valueAt(image, matrix.map((row, n) => Math.round(row[0] * voxel[0] + row[1] * voxel[1] + row[2] * voxel[2] + offset[n])));
        if (image.kind === "outline" && value && control("outline").checked) pixel = image.colour;
        if (image.kind === "map" && Math.abs(value) > 0.05 * image.most) {
          const part = Number(control("opacity").value) * Math.min(1, Math.abs(value) / image.most);
          const colour = value > 0 ? [230, 159, 0] : [0, 114, 178];
          pixel = pixel.map((own, n) => own * (1 - part) + colour[n] * part);
        }
      }
      picture.data.set([...pixel, 255], 4 * ((height - 1 - v) * width + u));
    }
  }
  context.putImageData(picture, 0, 0);
}

function valueAt(image, [x, y, z]) {
  const [nx, ny, nz] = image.shape;
  if (x < 0 || y < 0 || z < 0 || x >= nx || y >= ny || z >= nz) return 0;
  const frame = image.shape.length > 3 ? Number(control("component").value) : 0;
  return image.numbers[((frame * nz + z) * ny + y) * nx + x] * image.slope + image.inter;
}

// From voxels of one image to voxels of another: the second's inverse after the first's affine.
function between(from, to) {
  const [a, b, c] = to.map((row) => row.slice(0, 3));
  const cross = (p, q) => [p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]];
  const [bc, ca, ab] = [cross(b, c), cross(c, a), cross(a, b)], volume = a.reduce((sum, value, n) => sum + value * bc[n], 0);
  const inverse = [0, 1, 2].map((n) => [bc[n], ca[n], ab[n]].map((value) => value / volume));
  const times = (vector) => inverse.map((row) => row.reduce((sum, value, n) => sum + value * vector[n], 0));
  const columns = [0, 1, 2].map((column) => times(from.map((row) => row[column])));
  const matrix = [0, 1, 2].map((row) => columns.map((column) => column[row]));
  return [matrix, times(from.map((row, n) => row[3] - to[n][3]))];
}
