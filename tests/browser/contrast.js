// Elements with text whose contrast to the colour below them is less than 4.5: element, contrast, text.
[...document.querySelectorAll('body *')].filter((each) => each.checkVisibility() &&
    [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())).map((each) => {
  const numbers = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const light = (colour) => { const part = numbers(colour).slice(0, 3).map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2]; };
  let below = each, ground = 'rgb(255, 255, 255)';
  for (; below; below = below.parentElement) {
    const found = getComputedStyle(below).backgroundColor;
    if (numbers(found)[3] !== 0) { ground = found; break; }
  }
  const style = getComputedStyle(each);
  const ink = each.namespaceURI.endsWith('svg') ? style.fill : style.color;
  const [first, second] = [light(ink), light(ground)].sort((a, b) => b - a);
  return [each.tagName + '.' + each.className, (first + 0.05) / (second + 0.05), each.textContent.slice(0, 40)];
}).filter((each) => each[1] < 4.5 && !String(each[0]).startsWith('OPTION'))
