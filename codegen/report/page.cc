#include "codegen/report/page.h"

namespace mt {

absl::string_view PageStyle() {
  return R"css(
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:20px}
h1{font-size:22px;margin:0 0 4px}
h2{font-size:15px;margin:26px 0 8px}
.sub{color:var(--muted);margin:0 0 14px;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:8px 24px;margin:0 0 14px}
.facts b{display:block;font-size:17px;font-variant-numeric:tabular-nums}
.facts span{color:var(--muted);font-size:12px}
.tabs{display:flex;gap:6px;flex-wrap:wrap;margin:12px 0}
.tabs button{font:inherit;color:var(--ink);background:var(--free);border:1px solid var(--line);border-radius:6px;padding:4px 12px;cursor:pointer}
.tabs button[aria-pressed=true]{background:var(--ink);color:var(--paper)}
.tabs input{font:inherit;color:var(--ink);background:var(--paper);border:1px solid var(--line);border-radius:6px;padding:4px 10px;width:240px}
.tabs .hint{color:var(--muted);align-self:center;font-size:12px}
.chart{position:relative;border:1px solid var(--line);border-radius:8px;overflow:hidden;touch-action:none;cursor:crosshair}
.chart svg.mt-chart{display:block;width:100%;height:auto}
.chart svg.over{position:absolute;inset:0;width:100%;height:100%;pointer-events:none;will-change:transform}
.over .mark{fill:none;stroke:var(--ink);stroke-width:2px;vector-effect:non-scaling-stroke}
.over .found{fill:#ffd33d;fill-opacity:.85;stroke:none}
.over .cross{stroke:var(--ink);stroke-opacity:.45;stroke-width:1px}
.over .drag{fill:var(--ink);fill-opacity:.15;stroke:var(--ink)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
th,td{text-align:right;padding:3px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--muted);font-weight:600;font-size:12px}
td.t,th.t{text-align:left}
td.n{white-space:normal;overflow-wrap:anywhere;min-width:160px}
tr.sum td{font-weight:600}
i.key{display:inline-block;width:11px;height:11px;margin-right:7px;vertical-align:-1px}
.k-parameters{background:#4269d0}.k-gradients{background:#e8603c}.k-optimizer_state{background:#9467d8}
.k-activations{background:#2fa39a}.k-workspace{background:#a4714a}.k-io{background:#d9a400}
#tip{position:fixed;z-index:9;max-width:520px;pointer-events:none;background:var(--paper);color:var(--ink);border:1px solid var(--muted);border-radius:8px;padding:8px 11px;font-size:12.5px;box-shadow:0 3px 14px #0005;overflow-wrap:anywhere}
#tip b{display:block;margin-bottom:2px}
#tip dl{display:grid;grid-template-columns:auto 1fr;gap:0 10px;margin:0}
#tip dt{color:var(--muted)}
#tip dd{margin:0}
footer{color:var(--muted);font-size:12px;margin-top:28px}
[hidden]{display:none!important}
)css";
}

absl::string_view PageScript() {
  return R"js(
'use strict';
(() => {
  const D = JSON.parse(document.getElementById('plan').textContent);
  const L = D.layout, S = D.strings, NS = 'http://www.w3.org/2000/svg';
  const tip = document.getElementById('tip');
  const size = (n, digits = 1) => {
    if (n < 1024) return n + ' B';
    const u = ['KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
    let i = -1, x = n;
    do { x /= 1024; ++i; } while (x >= 1024 && i < u.length - 1);
    return (digits > 1 ? String(+x.toFixed(digits)) : x.toFixed(1)) + ' ' + u[i];
  };
  const make = (parent, tag, css) => {
    const e = document.createElementNS(NS, tag);
    if (css) e.setAttribute('class', css);
    parent.appendChild(e);
    return e;
  };
  const set = (e, values) => { for (const k in values) e.setAttribute(k, values[k]); };

  function chart(section, P) {
    const box = section.querySelector('.chart'), svg = box.querySelector('svg.mt-chart');
    const plot = svg.querySelector('.mt-plot'), phases = svg.querySelector('.mt-phases');
    const timeline = svg.querySelector('.mt-timeline'), names = svg.querySelector('.mt-names');
    const xticks = svg.querySelector('.mt-xticks'), yticks = svg.querySelector('.mt-yticks');
    const peak = svg.querySelector('.mt-peak'), peakX = P.peak + 0.5;
    const start = {x: xticks.innerHTML, y: yticks.innerHTML};
    const N = Math.max(P.op.length, 1), U = D.units;
    let view = {x: 0, y: 0, w: N, h: U}, frame = 0, hit = -1, drag = null, found = [];

    // Live bytes after each instruction, and what each buffer holds from when on.
    const live = new Float64Array(N + 1), B = P.first.length;
    let states = 0;
    for (let b = 0; b < B; ++b) {
      if (P.state[b]) { states += P.live[b]; continue; }
      live[P.first[b]] += P.live[b];
      live[P.last[b] + 1] -= P.live[b];
    }
    for (let i = 0, sum = states; i <= N; ++i) live[i] = (sum += live[i]);
    const holds = Array.from({length: B}, () => []);
    for (let t = 0; t < P.buffer.length; ++t) holds[P.buffer[t]].push(t);

    const over = make(box, 'svg', 'over');
    set(over, {viewBox: '0 0 ' + L.width + ' ' + L.height});
    const clip = make(over, 'svg');
    set(clip, {x: L.left, y: L.top, width: L.plotWidth, height: L.plotHeight, preserveAspectRatio: 'none', viewBox: '0 0 ' + N + ' ' + U});
    const matches = make(clip, 'path', 'found'), mark = make(clip, 'rect', 'mark');
    const cross = make(over, 'path', 'cross'), dragged = make(over, 'rect', 'drag');

    const tick = (g, x, y, anchor, text) => {
      const e = make(g, 'text', 'mt-tick');
      set(e, {x, y, 'text-anchor': anchor});
      e.textContent = text;
    };
    const steps = (range, ticks, next) => { let s = 1, i = 0; while (range / s > ticks) s = next(s, i++); return s; };
    function draw() {
      const whole = view.w === N && view.h === U;
      plot.setAttribute('viewBox', [view.x, view.y, view.w, view.h].join(' '));
      clip.setAttribute('viewBox', [view.x, view.y, view.w, view.h].join(' '));
      phases.setAttribute('viewBox', [view.x, 0, view.w, 10].join(' '));
      if (timeline) timeline.setAttribute('viewBox', [view.x / N * P.columns, 0, view.w / N * P.columns, 10000].join(' '));
      names.style.display = whole ? '' : 'none';
      const at = L.left + L.plotWidth * (peakX - view.x) / view.w;
      peak.style.display = at >= L.left && at <= L.left + L.plotWidth ? '' : 'none';
      const was = L.left + L.plotWidth * peakX / N;
      peak.setAttribute('transform', 'translate(' + (at - was) + ')');
      if (whole) { xticks.innerHTML = start.x; yticks.innerHTML = start.y; }
      else {
        xticks.replaceChildren();
        yticks.replaceChildren();
        const sx = steps(view.w, 12, (s, i) => i % 3 === 1 ? s / 2 * 5 : s * 2);
        for (let i = Math.ceil(view.x / sx) * sx; i < view.x + view.w; i += sx) {
          tick(xticks, L.left + L.plotWidth * (i + 0.5 - view.x) / view.w, L.ticks + 13, 'middle', i);
        }
        const low = (U - view.y - view.h) * D.unit, high = (U - view.y) * D.unit;
        const sy = steps(high - low, 8, s => s * 2);
        for (let v = Math.ceil(low / sy) * sy; v <= high; v += sy) {
          const y = L.top + L.plotHeight * (high - v) / (high - low);
          tick(yticks, L.left - 9, y + 4, 'end', size(v, 2));
        }
      }
    }
    function look(event) {
      const r = svg.getBoundingClientRect();
      const x = (event.clientX - r.left) * L.width / r.width, y = (event.clientY - r.top) * L.height / r.height;
      const px = Math.min(Math.max(x, L.left), L.left + L.plotWidth), py = Math.min(Math.max(y, L.top), L.top + L.plotHeight);
      return {x, y, px, py, t: view.x + (px - L.left) / L.plotWidth * view.w, u: view.y + (py - L.top) / L.plotHeight * view.h,
              inside: x >= L.left && x <= L.left + L.plotWidth, inPlot: y >= L.top && y <= L.top + L.plotHeight};
    }
    const label = i => i < P.op.length ? i + ': ' + S[P.op[i]] + ' ' + S[P.name[i]] : String(i);
    function rows(list) {
      const dl = document.createElement('dl');
      for (const [k, v] of list) {
        if (v === '') continue;
        dl.appendChild(document.createElement('dt')).textContent = k;
        dl.appendChild(document.createElement('dd')).textContent = v;
      }
      return dl;
    }
    function describe(b, t) {
      const title = document.createElement('b');
      if (b < 0) {
        title.textContent = label(t);
        tip.replaceChildren(title, rows([['live', size(live[t])], ['phase', P.op.length ? D.phases[P.phase[t]] : '']]));
        return;
      }
      let held = -1;
      for (const k of holds[b]) if (held < 0 || P.made[k] <= t) held = k;
      const made = held < 0 ? P.first[b] : P.made[held], byInstruction = !P.state[b] && made >= 0 && made < P.op.length;
      title.textContent = held >= 0 && !P.state[b] ? S[P.tensor[held]] : S[P.label[b]];
      const pass = byInstruction ? S[P.pass[made]] : '';
      tip.replaceChildren(title, rows([
        ['op', byInstruction ? S[P.op[made]] + (P.again[made] ? ', recomputed' : '') : P.state[b] ? 'state' : 'input'],
        ['type', held >= 0 ? S[P.type[held]] : P.state[b] ? S[P.stateType[b]] : ''],
        ['bytes', size(P.bytes[b]) + ' (' + P.bytes[b].toLocaleString('en') + ')'],
        ['offset', P.offset[b].toLocaleString('en')],
        ['class', D.classes[P.cls[b]].replace('_', ' ')],
        ['live', P.state[b] ? 'always' : P.first[b] === P.last[b] ? label(P.first[b]) : label(P.first[b]) + ' to ' + label(P.last[b])],
        ['made by', byInstruction ? (pass === '' ? 'the model' : 'pass ' + pass) : ''],
        ['at', label(t) + ', ' + size(live[t]) + ' live'],
      ]));
    }
    function hover(event) {
      const p = look(event);
      if (!p.inside) { leave(); return; }
      const t = Math.min(Math.max(Math.floor(p.t), 0), N - 1), byte = (U - p.u) * D.unit;
      hit = -1;
      if (p.inPlot) {
        for (let b = 0; b < B; ++b) {
          if (P.offset[b] <= byte && byte < P.offset[b] + P.live[b] && (P.state[b] || (P.first[b] <= t && t <= P.last[b]))) { hit = b; break; }
        }
      }
      if (hit >= 0) {
        const first = P.state[hit] ? 0 : P.first[hit], last = P.state[hit] ? N - 1 : P.last[hit];
        set(mark, {x: first, y: U - (P.offset[hit] + P.live[hit]) / D.unit, width: last - first + 1, height: P.live[hit] / D.unit});
      }
      mark.style.display = hit >= 0 ? '' : 'none';
      cross.setAttribute('d', 'M' + p.px + ' ' + L.top + 'V' + (timeline ? L.timelineBottom : L.ticks));
      cross.style.display = '';
      describe(hit, t);
      tip.hidden = false;
      const w = tip.offsetWidth, h = tip.offsetHeight;
      tip.style.left = Math.max(4, event.clientX + 16 + w > innerWidth ? event.clientX - 16 - w : event.clientX + 16) + 'px';
      tip.style.top = Math.max(4, event.clientY + 16 + h > innerHeight ? event.clientY - 16 - h : event.clientY + 16) + 'px';
    }
    function leave() {
      tip.hidden = true;
      mark.style.display = cross.style.display = 'none';
    }
    function rubber(event) {
      const p = look(event);
      set(dragged, {x: Math.min(p.px, drag.px), y: Math.min(p.py, drag.py), width: Math.abs(p.px - drag.px), height: Math.abs(p.py - drag.py)});
      dragged.style.display = '';
    }
    box.addEventListener('pointermove', event => {
      if (frame) cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => { frame = 0; if (drag) rubber(event); hover(event); });
    });
    box.addEventListener('pointerleave', () => { if (!drag) leave(); });
    box.addEventListener('pointerdown', event => {
      const p = look(event);
      if (!p.inside || !p.inPlot || event.button !== 0) return;
      drag = p;
      box.setPointerCapture(event.pointerId);
    });
    box.addEventListener('pointerup', event => {
      if (!drag) return;
      const a = drag, p = look(event);
      drag = null;
      dragged.style.display = 'none';
      if (Math.abs(p.px - a.px) < 5 || Math.abs(p.py - a.py) < 5) return;
      view = {x: Math.min(a.t, p.t), y: Math.min(a.u, p.u), w: Math.max(Math.abs(a.t - p.t), 1e-3), h: Math.max(Math.abs(a.u - p.u), 1e-3)};
      draw();
    });
    const reset = () => { view = {x: 0, y: 0, w: N, h: U}; draw(); leave(); };
    box.addEventListener('dblclick', reset);
    leave();
    dragged.style.display = 'none';
    return {
      reset,
      find(text) {
        let path = '', count = 0;
        const wanted = text.toLowerCase();
        for (let b = 0; wanted && b < B; ++b) {
          let match = S[P.label[b]].toLowerCase().includes(wanted);
          for (const t of holds[b]) match = match || S[P.tensor[t]].toLowerCase().includes(wanted);
          if (!match) continue;
          ++count;
          const first = P.state[b] ? 0 : P.first[b], last = P.state[b] ? N - 1 : P.last[b];
          path += 'M' + first + ' ' + (U - (P.offset[b] + P.live[b]) / D.unit) + 'h' + (last - first + 1) + 'v' + P.live[b] / D.unit + 'h' + (first - last - 1) + 'z';
        }
        set(matches, {d: path});
        return count;
      },
      describeAt: hover,
      show() { draw(); },
    };
  }

  const sections = [...document.querySelectorAll('section[data-program]')];
  const charts = sections.map((s, i) => chart(s, D.programs[i]));
  const buttons = [...document.querySelectorAll('.tabs button[data-program]')];
  const search = document.getElementById('find'), count = document.getElementById('count');
  let shown = 0;
  const refind = () => {
    const n = charts[shown].find(search.value);
    count.textContent = search.value ? n + (n === 1 ? ' buffer' : ' buffers') : 'drag: zoom, double click: all';
  };
  const choose = i => {
    shown = i;
    sections.forEach((s, k) => { s.hidden = k !== i; });
    buttons.forEach((b, k) => b.setAttribute('aria-pressed', k === i));
    refind();
  };
  buttons.forEach((b, i) => b.addEventListener('click', () => choose(i)));
  search.addEventListener('input', refind);
  document.getElementById('all').addEventListener('click', () => charts[shown].reset());
  choose(D.shown);
})();
)js";
}

}  // namespace mt
