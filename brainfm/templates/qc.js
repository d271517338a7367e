// Decisions are made beside each scan, and saved as a file for `brainfm qc DIR --decisions FILE`.
const save = document.querySelector(".save");
const [by, saveButton, status] = save.querySelectorAll("input, button, [role=status]");
const groups = [...document.querySelectorAll(".decide")];
let saved = true;

for (const group of groups) {
  const [accept, reject, why] = group.querySelectorAll("button, input");
  for (const [button, other] of [[accept, reject], [reject, accept]]) {
    button.addEventListener("click", () => {
      button.ariaPressed = String(button.ariaPressed !== "true"); // a second click takes it back
      other.ariaPressed = "false";
      why.hidden = !decided(group);
      if (!why.hidden) why.focus();
    });
  }
}
for (const event of ["click", "input"]) document.querySelector("main").addEventListener(event, tell);

saveButton.addEventListener("click", (event) => {
  event.stopPropagation();
  const date = new Date().toISOString().slice(0, 19) + "+00:00";
  const decisions = groups.filter(decided).map((group) => ({
    scan: group.dataset.scan, decision: decided(group).value, by: by.value.trim(), why: whyOf(group), date, record: group.dataset.record,
  }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(decisions, null, 2) + "\n"], { type: "application/json" }));
  link.download = "decisions.json";
  link.click();
  saved = true;
});
addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });

function tell(event) {
  if (!event.target.closest(".decide, .save")) return;
  const made = groups.filter(decided);
  const without = made.find((group) => !whyOf(group));
  save.hidden = made.length === 0;
  saveButton.disabled = Boolean(without) || !by.value.trim();
  saved = made.length === 0;
  status.textContent = `${made.length} decided` + (without ? `; say why of ${without.dataset.scan}` : by.value.trim() ? "" : "; say who");
}

function decided(group) {
  return group.querySelector("[aria-pressed=true]");
}

function whyOf(group) {
  return group.querySelector("input").value.trim();
}
