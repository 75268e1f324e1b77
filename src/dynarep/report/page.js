(function () {
  "use strict";
  var root = document.documentElement;
  root.classList.add("script"); /* buttons that need this script are shown */

  function all(selector, inside) {
    return Array.prototype.slice.call((inside || document).querySelectorAll(selector));
  }

  /* -- filters: verdict, paper, tier -- */
  var bar = document.getElementById("filters");
  var rows = all("tbody[data-verdict]");
  var nothing = { verdict: "all", paper: "all", tier: "all" };
  var chosen = Object.assign({}, nothing);

  function fits(row) {
    return Object.keys(chosen).every(function (what) {
      return chosen[what] === "all" || row.getAttribute("data-" + what).split(" ").indexOf(chosen[what]) >= 0;
    });
  }

  function show() {
    var shown = 0;
    rows.forEach(function (row) {
      row.hidden = !fits(row);
      shown += row.hidden ? 0 : 1;
    });
    all("button", bar).forEach(function (button) {
      var on = chosen[button.getAttribute("data-what")] === button.value;
      button.setAttribute("aria-pressed", on ? "true" : "false");
    });
    document.getElementById("shown").textContent = "Showing " + shown + " of " + rows.length + " claims";
    document.getElementById("none").hidden = shown > 0;
  }

  if (bar) {
    bar.hidden = false;
    bar.addEventListener("click", function (event) {
      var button = event.target.closest("button");
      if (button) {
        chosen[button.getAttribute("data-what")] = button.value;
        show();
      }
    });
    show();
  }

  /* -- links into what is folded or filtered away -- */
  function arrive() {
    var target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) {
      return;
    }
    if (target.hidden) {
      chosen = Object.assign({}, nothing);
      show();
    }
    for (var part = target; part; part = part.parentElement) {
      if (part.tagName === "DETAILS") {
        part.open = true;
      }
    }
    target.scrollIntoView();
  }
  window.addEventListener("hashchange", arrive);
  if (location.hash) {
    arrive();
  }

  /* -- paper: what is folded is printed, but not the lists of commands -- */
  var unfolded = [];
  window.addEventListener("beforeprint", function () {
    unfolded = all("details:not(.long):not([open])");
    unfolded.forEach(function (part) { part.open = true; });
  });
  window.addEventListener("afterprint", function () {
    unfolded.forEach(function (part) { part.open = false; });
  });

  /* -- figures in full screen -- */
  var dialog = document.getElementById("zoom");
  var stage = document.getElementById("stage");
  var level = document.getElementById("level");
  var natural = 1, scale = 1, drawn = null, opener = null;

  function fit() {
    return Math.min(stage.clientWidth / natural, 2);
  }

  /* Zoom about a point of the stage: what lies under it stays there. */
  function zoom(to, x, y) {
    var before = scale;
    scale = Math.max(Math.min(fit(), 0.25), Math.min(8, to));
    var left = (stage.scrollLeft + x) * scale / before - x;
    var top = (stage.scrollTop + y) * scale / before - y;
    drawn.style.width = Math.round(natural * scale) + "px";
    stage.scrollLeft = left;
    stage.scrollTop = top;
    level.textContent = Math.round(100 * scale) + " %";
  }

  function step(factor) {
    zoom(scale * factor, stage.clientWidth / 2, stage.clientHeight / 2);
  }

  function whole() {
    zoom(fit(), 0, 0);
    stage.scrollTop = 0;
  }

  function enlarge(from, frame) {
    var figure = frame.firstElementChild;
    opener = from;
    drawn = figure.cloneNode(true); /* a data address or a reference into this page: nothing is loaded */
    ["width", "height", "style"].forEach(function (name) { drawn.removeAttribute(name); });
    natural = Number(figure.getAttribute("width")) || figure.naturalWidth || 800;
    stage.replaceChildren(drawn);
    document.getElementById("zoom-title").textContent = frame.getAttribute("aria-label");
    dialog.showModal();
    scale = 1;
    whole();
    stage.focus();
  }

  if (dialog && dialog.showModal) {
    document.addEventListener("click", function (event) {
      var button = event.target.closest("button.enlarge");
      var frame = button ? button.parentElement.querySelector(".scroll") : event.target.closest("figure .scroll");
      if (frame && !(getSelection() + "")) {
        enlarge(button || frame, frame);
      }
    });
    document.addEventListener("keydown", function (event) {
      if (event.key === "Enter" && event.target.matches("figure .scroll")) {
        event.preventDefault();
        enlarge(event.target, event.target);
      }
    });
    dialog.addEventListener("click", function (event) {
      var button = event.target.closest("button");
      var act = button && button.value;
      if (act === "in" || act === "out") {
        step(act === "in" ? 1.25 : 0.8);
      } else if (act === "whole") {
        whole();
      } else if (act === "close") {
        dialog.close();
      }
    });
    dialog.addEventListener("keydown", function (event) {
      var factor = { "+": 1.25, "=": 1.25, "-": 0.8 }[event.key];
      if (event.ctrlKey || event.metaKey || event.altKey) {
        return;
      }
      if (factor || event.key === "0") {
        event.preventDefault();
        factor ? step(factor) : whole();
      }
    });
    stage.addEventListener("wheel", function (event) {
      var box = stage.getBoundingClientRect();
      event.preventDefault();
      zoom(scale * Math.exp(-event.deltaY / 500), event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
    stage.addEventListener("pointerdown", function (event) {
      if (event.pointerType === "mouse" && event.button === 0) {
        stage.setPointerCapture(event.pointerId);
        stage.classList.add("held");
      }
    });
    stage.addEventListener("pointermove", function (event) {
      if (stage.hasPointerCapture(event.pointerId)) {
        stage.scrollLeft -= event.movementX;
        stage.scrollTop -= event.movementY;
      }
    });
    stage.addEventListener("lostpointercapture", function () { stage.classList.remove("held"); });
    stage.addEventListener("dragstart", function (event) { event.preventDefault(); });
    window.addEventListener("resize", function () {
      if (dialog.open) {
        whole();
      }
    });
    dialog.addEventListener("close", function () {
      stage.replaceChildren();
      opener.focus();
    });
  }
})();
